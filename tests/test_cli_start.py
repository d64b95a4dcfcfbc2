"""The command line around its commands: what it loads and when, help, errors, Ctrl-C."""

import os
import subprocess
import sys
from typing import get_args

import pytest
from commands import run

import ssm_interp as si
from ssm_interp import models, plots, prompts
from ssm_interp.cli import check, main
from ssm_interp.experiments import COMMANDS, Experiment, parts
from ssm_interp.hooks.rows.metrics import NAMES
from ssm_interp.words import MetricName

LOADED = """
import sys
from ssm_interp import cli
try:
    cli.main(sys.argv[1:])
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
    ("words", "code"),
    [((), 0), (("flow", "--help"), 0), (("--version",), 0), (("flwo",), 2), (("flow", "--colour"), 2)],
)
def test_help_version_and_misuse_load_no_torch(words: tuple[str, ...], code: int) -> None:
    done = python(LOADED, *words)
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize("module", ["cyclopts", "torch"])
def test_control_c_while_it_is_loaded_is_one_line(module: str) -> None:
    done = python(AT_IMPORT.format(module=module, action="raise KeyboardInterrupt"))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_of_torch_sleep_unless_told_otherwise(given: dict[str, str], policy: str) -> None:
    done = python(AT_IMPORT.format(module="torch", action="sys.exit(os.environ['OMP_WAIT_POLICY'])"), **given)
    assert done.stderr.strip() == policy


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_every_option(command: type[Experiment]) -> None:
    name = command.__name__.lower()
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"ssm-interp {name}" in result.stdout.split("Example:")[1]
    wanted = ["--device", "--device-map"] + ["--revision", "--dtype"] * (name != "run")  # where a model is loaded
    assert all(f"{option} " in result.stdout for option in wanted)
    assert ".experiment" not in result.stdout


def test_help_and_version() -> None:
    for words in ([], ["--help"]):
        result = run(*words)
        assert result.exit_code == 0
        assert all(f" {command.__name__.lower()} " in result.stdout for command in COMMANDS)
    assert run("--version").stdout.strip() == f"ssm-interp {si.__version__}"


def test_what_is_known_without_loading_it_is_what_is_loaded() -> None:
    assert get_args(MetricName) == tuple(NAMES)
    assert parts.EMBEDDED == models.EMBEDDED
    assert parts.FACTS == prompts.facts_file.EMBEDDED
    assert get_args(parts.Summary.model_fields["statistic"].annotation) == get_args(plots.StatisticName)


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ssm_interp", "flwo"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.startswith('error: Unknown command "flwo". Did you mean "flow"?')


@pytest.mark.parametrize("words", [["--debug", "flow"], ["flow", "--debug"]])
def test_debug_shows_the_traceback(words: list[str]) -> None:
    with pytest.raises(si.PromptError, match=r"missing\.jsonl"):
        main([*words, "--prompts", "missing.jsonl"])


@pytest.mark.parametrize(("fault", "code"), [(ZeroDivisionError, None), (KeyboardInterrupt, 130)])
def test_a_fault_of_our_own_is_not_dressed_up_and_control_c_is(
    monkeypatch: pytest.MonkeyPatch, fault: type[BaseException], code: int | None
) -> None:
    def broken(model: object) -> None:
        raise fault

    monkeypatch.setattr(check, "check_model", broken)
    if code is None:
        with pytest.raises(fault):
            main(["check", "tiny-mamba1"])
    else:
        result = run("check", "tiny-mamba1")
        assert (result.exit_code, result.stderr) == (code, "interrupted\n")
