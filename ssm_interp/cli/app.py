"""The app: a command per experiment, made from its declaration, and its errors.

cyclopts makes the flags, since it hands on pydantic's own errors with their keys, raises instead of printing (an error
is one line here), and takes several values behind one flag as well as the flag repeated. tyro prints boxes and drops
fields of types such as ByteSize; pydantic-settings knows no nearest flag, and shows types where help has names.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import docstring_parser
from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError
from pydantic import ValidationError

from ssm_interp import __version__
from ssm_interp.errors import SsmInterpError, SsmInterpWarning
from ssm_interp.experiments import COMMANDS, Experiment, Problem, problems

EXPECTED = (SsmInterpError, ValueError, RuntimeError, OSError, ImportError, MemoryError)
INTERRUPTED = 130
HELP = """Mechanistic interpretability of Mamba-1 and Mamba-2 language models.

With --debug, wherever it stands, an error shows its traceback."""


def _default(value: Any) -> str:
    """A default as it would be given."""
    if value is None or value is False or value == {}:
        return "none" if value is not False else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


app = App(
    name="ssm-interp",
    help=HELP,
    help_format="markdown",
    version=f"ssm-interp {__version__}",
    default_parameter=Parameter(negative=(), consume_multiple=True, show_default=_default),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)


def _command(declared: type[Experiment]) -> Callable[[Experiment], int | None]:
    default = declared()

    def command(experiment: Experiment = default) -> int | None:
        _quiet()
        module = import_module(f"ssm_interp.cli.{declared.__name__.lower()}")  # and torch and transformers with it
        code: int | None = module.run(experiment)
        return code

    taken = inspect.Parameter(
        "experiment", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=declared
    )
    command.__signature__ = inspect.Signature([taken])  # type: ignore[attr-defined]
    command.__annotations__["experiment"] = declared
    command.__doc__ = declared.__doc__
    return command


for _declared in COMMANDS:
    app.command(_command(_declared), name=_declared.__name__.lower())


def main(words: Sequence[str] | None = None) -> None:
    """Entry point of the `ssm-interp` command: every error is one line on stderr and exit code 2.

    Args:
        words: of the command line; None: those of this process.

    Raises:
        SystemExit: always, with the exit code.
    """
    given = list(sys.argv[1:] if words is None else words)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded: its idle threads sleep, not spin
    with _warnings_in_a_line(), _sources_read_once():
        sys.exit(_run([word for word in given if word != "--debug"], debug="--debug" in given))


def _run(words: list[str], *, debug: bool) -> int:
    try:
        return app(words, exit_on_error=False, print_error=False) or 0
    except KeyboardInterrupt as error:
        _complain("interrupted", error)
        return INTERRUPTED
    except (CycloptsError, *EXPECTED) as error:
        if debug:
            raise
        _complain(f"error: {_message(error)}", error)
        return 2


def _quiet() -> None:
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _sources_read_once() -> Iterator[None]:
    """cyclopts looks for docstrings of fields in the source of every class above a part, pydantic's own each time anew,
    which takes a third of a help's time."""
    reads = docstring_parser.parse_from_object
    docstring_parser.parse_from_object = cache(reads)
    try:
        yield
    finally:
        docstring_parser.parse_from_object = reads


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Warnings of this package are lines on stderr, each once; those of others stay what they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", SsmInterpWarning)  # whatever the interpreter does with warnings
        others, said = warnings.showwarning, set[str]()

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, SsmInterpWarning):
                others(message, category, *place, **more)
            elif str(message) not in said:
                said.add(str(message))
                _complain(f"warning: {message}", None)

        warnings.showwarning = show
        yield


def _message(error: Exception) -> str:
    invalid = error.__cause__ if isinstance(error, CycloptsError) else error
    if isinstance(invalid, ValidationError):
        return "; ".join(
            f"{_flag(problem)}: {problem.message}" if problem.key else problem.message for problem in problems(invalid)
        )
    if isinstance(error, UnusedCliTokensError):
        return f"there is nothing here that takes {' '.join(error.unused_tokens or ())!r}; --help says what there is"
    return str(error) or type(error).__name__


def _flag(problem: Problem) -> str:
    """The flag that a problem is of, as the command's help names it first."""
    names = [
        name
        for part in problem.fields[-1:]
        for data in part.metadata
        if isinstance(data, Parameter)
        for name in data.name or ()
    ]
    field = next(part for part in reversed(problem.key) if isinstance(part, str))
    return names[0] if names else f"--{field.replace('_', '-')}"


def _complain(message: str, error: BaseException | None) -> None:
    parts = [message, *getattr(error, "__notes__", ())]
    text = parts[0] if len(parts) == 1 else ". ".join(part.removesuffix(".") for part in parts)
    sys.stderr.write(" ".join(text.split()) + "\n")
