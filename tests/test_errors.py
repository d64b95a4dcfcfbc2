"""One tree of errors: whatever the package raises of its own is below its root, and is a built-in too."""

from __future__ import annotations

import pickle
import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest

import ssm_interp
from ssm_interp.errors import MissingError, NothingAnswered, SsmInterpError, SsmInterpWarning


def own_exceptions() -> dict[str, type[BaseException]]:
    """Every exception class, warnings too, that a module of the package defines."""
    names = [
        module.name
        for module in pkgutil.walk_packages(ssm_interp.__path__, "ssm_interp.")
        if not module.name.endswith("__main__")
    ]
    values = [(value, name) for name in names for value in vars(import_module(name)).values()]
    return {
        value.__name__: value
        for value, name in values
        if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == name
    }


def test_every_exception_of_the_package_is_below_its_root_and_a_built_in() -> None:
    every = own_exceptions()
    warned = {name: kind for name, kind in every.items() if issubclass(kind, Warning)}
    raised = {name: kind for name, kind in every.items() if name not in warned and kind is not SsmInterpError}
    assert {"HookedWarning", "SharedTokenWarning", "NoEdgesWarning"} <= set(warned)
    assert [name for name, kind in warned.items() if not issubclass(kind, SsmInterpWarning)] == []
    assert issubclass(SsmInterpWarning, UserWarning)
    assert {"TermsError", "HookError", "FeatureError", "FlowError", "PlotError", "ResultError"} <= set(raised)
    assert [name for name, kind in raised.items() if not issubclass(kind, SsmInterpError)] == []
    assert [name for name, kind in raised.items() if not issubclass(kind, ValueError | RuntimeError | OSError)] == []
    assert issubclass(MissingError, KeyError)


def test_errors_load_nothing() -> None:
    script = "import sys, ssm_interp.errors; print(sorted({'torch', 'pandas', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_a_message_is_shown_as_it_is_written_and_survives_another_process() -> None:
    assert str(MissingError("there is no SSM layer 3")) == "there is no SSM layer 3"
    with pytest.raises(KeyError, match="^there is no SSM layer 3$"):
        raise MissingError("there is no SSM layer 3")
    nothing = NothingAnswered(7, full_answer=True)
    again = pickle.loads(pickle.dumps(nothing))
    assert (type(again), str(again), again.asked, again.full_answer) == (NothingAnswered, str(nothing), 7, True)
    assert "none of the 7 prompts" in str(nothing)
