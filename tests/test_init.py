"""The package loads torch when something is asked of it, and not before."""

import subprocess
import sys

import pytest

import ssm_interp as si

LAZY = """
import sys
import ssm_interp as si
assert "torch" not in sys.modules
assert set(si.__all__) | {"flow", "__version__"} <= set(dir(si))
assert "torch" not in sys.modules
si.load_prompts
assert "torch" in sys.modules
"""


def test_importing_it_loads_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_name_is_there() -> None:
    everything: dict[str, object] = {}
    exec("from ssm_interp import *", everything)
    assert {name: everything[name] for name in si.__all__} == {name: getattr(si, name) for name in si.__all__}
    assert si.attach is si.hooks.attach
    assert si.load is si.models.load
    assert si.load_prompts is si.prompts.load_prompts
    assert si.flow.sweep.__module__ == "ssm_interp.flow.sweep"


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ssm_interp' has no attribute 'atach'"):
        _ = si.atach
    assert not hasattr(si, "cli_")
