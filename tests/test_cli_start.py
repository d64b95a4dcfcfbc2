"""The command line around its commands: what it loads and when, help, errors, Ctrl-C."""

import inspect
import os
import subprocess
import sys
from importlib import import_module

import pytest
from test_cli import run

import ssm_interp as si
from ssm_interp.cli import look
from ssm_interp.cli.app import COMMANDS

LOADED = """
import sys
from ssm_interp import cli
try:
    cli.app(sys.argv[1:])
except SystemExit as end:
    heavy = {"torch", "transformers", "pandas", "matplotlib"} & set(sys.modules)
    sys.exit(f"loaded {heavy}" if heavy else end.code)
"""

AT_IMPORT = """
import os, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "{module}":
            {action}
sys.meta_path.insert(0, Finder())
from ssm_interp.cli import main
sys.argv = ["ssm-interp", "check", "tiny-mamba1"]
main()
"""


def python(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=inherited | environment,
    )


@pytest.mark.parametrize(
    ("words", "code"), [((), 0), (("--help",), 0), (("--version",), 0), (("flwo",), 2), (("--colour",), 2)]
)
def test_help_version_and_misuse_load_no_torch(words: tuple[str, ...], code: int) -> None:
    done = python(LOADED, *words)
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize("module", ["typer", "torch"])
def test_control_c_while_it_is_loaded_is_one_line(module: str) -> None:
    done = python(AT_IMPORT.format(module=module, action="raise KeyboardInterrupt"))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_of_torch_sleep_unless_told_otherwise(given: dict[str, str], policy: str) -> None:
    done = python(AT_IMPORT.format(module="torch", action="sys.exit(os.environ['OMP_WAIT_POLICY'])"), **given)
    assert done.stderr.strip() == policy


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_each_says_of_itself(name: str) -> None:
    module, summary = COMMANDS[name]
    documented = inspect.getdoc(getattr(import_module(f"ssm_interp.cli.{module}"), name))
    assert documented is not None
    assert documented.splitlines()[0] == summary


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"ssm-interp {command}" in result.stdout.split("Example:")[1]
    wanted = ["--device", "--device-map"] + ["--revision", "--dtype"] * (command != "run")  # where a model is loaded
    assert all(f"{option} " in result.stdout for option in wanted)


def test_help_and_version() -> None:
    for words in ([], ["--help"]):
        result = run(*words)
        assert result.exit_code == 0
        assert "attention" in result.stdout
    assert run("--version").stdout.strip() == f"ssm-interp {si.__version__}"


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ssm_interp", "check"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.strip().lower() == "error: missing argument 'model'."


@pytest.mark.parametrize("words", [["--debug", "flow"], ["flow", "--debug"]])
def test_debug_shows_the_traceback(words: list[str]) -> None:
    result = run(*words, "--prompts", "missing.jsonl")
    assert isinstance(result.exception, si.PromptError)
    assert result.exit_code == 1


def test_a_fault_of_our_own_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(look, "check_model", broken)
    assert isinstance(run("check", "tiny-mamba1").exception, ZeroDivisionError)


def test_control_c_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(look, "check_model", interrupt)
    result = run("check", "tiny-mamba1")
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted"
