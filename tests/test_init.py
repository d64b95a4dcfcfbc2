"""The package loads torch when something is asked of it, and not before; it has the names that it says it has."""

import ast
import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest

import ssm_interp as si

LAZY = """
import sys
import ssm_interp as si
si.SsmInterpError, si.errors.HookError, dir(si)
try:
    si.atach
except AttributeError:
    pass
assert "torch" not in sys.modules
si.load_prompts
assert "torch" in sys.modules
"""
INNER = {"__main__", "arguments", "cli", "reprs", "words"}
"""Modules that nobody asks the package for."""


def test_importing_it_loads_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_table_of_names_is_complete_and_true() -> None:
    assert list(si._HOME_OF) == list(dict.fromkeys(si._HOME_OF))
    assert sorted(si._HOME_OF) == sorted(si.__all__) == sorted(set(si.__all__))
    assert set(si._FLOORS) == {module.name for module in pkgutil.iter_modules(si.__path__)} - INNER
    for name, home in si._HOME_OF.items():
        floor = import_module(f"ssm_interp.{home}")
        assert getattr(si, name) is getattr(floor, name), name
        assert name in getattr(floor, "__all__", [name]), name
    assert si.flow.sweep is si.sweep


def test_type_checkers_see_the_same_names() -> None:
    assert si.__file__ is not None
    with open(si.__file__, encoding="utf-8") as file:
        blocks = [node for node in ast.parse(file.read()).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: str(node.module).split(".")[1] for node in imports for alias in node.names}
    assert seen == si._HOME_OF


def test_it_shows_what_it_offers_and_nothing_else() -> None:
    assert dir(si) == sorted({*si.__all__, *si._FLOORS, "__version__"})
    everything: dict[str, object] = {}
    exec("from ssm_interp import *", everything)
    assert set(everything) - {"__builtins__"} == set(si.__all__)


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ssm_interp' has no attribute 'atach'; did you mean 'attach'"):
        _ = si.atach
    with pytest.raises(AttributeError, match="has no attribute 'zzzz'$"):
        _ = si.zzzz
    assert not hasattr(si, "cli_")
