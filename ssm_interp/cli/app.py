"""The app: its commands, each loaded when it is called, and its errors."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from ssm_interp import __version__

EXPECTED = (ValueError, RuntimeError, OSError, ImportError, MemoryError)
INTERRUPTED = 130
COMMANDS = {
    "flow": ("flow", "Draw an information-flow map: where in the layers each part of a prompt reaches the answer."),
    "run": ("run", "Run an experiment from a recipe: a TOML file that says what is asked, knocked out and drawn."),
    "heatmap": ("look", "Draw which single token of a prompt matters in which layers."),
    "edges": ("edges", "Attribute a prompt's answer to every single edge, target <- source, in one backward pass."),
    "circuit": ("circuit", "Search for the edge groups that a behaviour needs, by exact knockouts of all the others."),
    "features": (
        "features",
        "Measure what tells the features of each layer apart: decay, half-life, reach, variation of dt.",
    ),
    "attention": ("look", "Draw the SSM attention of one layer on a text as a heat map."),
    "check": ("look", "Attach to a model and prove, on a tiny input, that the hooks tell the truth."),
}
"""Command -> the module that its function of that name is in, and the first line of that function's docstring."""


class _Later(TyperCommand):
    """A command as the list of commands shows it. Called, it gives way to the real one."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return _command(str(self.name)).make_context(info_name, args, parent=parent, **extra)


def _command(name: str) -> Any:
    """The command itself, whose module brings torch and transformers with it."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded: its idle threads sleep, not spin
    from ssm_interp.errors import SsmInterpWarning

    warnings.simplefilter("always", SsmInterpWarning)  # whatever the interpreter does with warnings
    function = getattr(import_module(f"ssm_interp.cli.{COMMANDS[name][0]}"), name)
    _quiet()
    own = typer.Typer(add_completion=False, rich_markup_mode="rich")
    own.command(name)(function)
    return get_command(own)


def _quiet() -> None:
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class _Commands(TyperGroup):
    """Every error is one line on stderr and exit code 2; with `--debug`, wherever it stands, its traceback."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: _Later(name, help=summary) for name, (_, summary) in COMMANDS.items()}

    def main(self, args: Sequence[str] | None = None, *positional: Any, **options: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        options["standalone_mode"] = False
        with _warnings_in_a_line():
            sys.exit(self._run(given, *positional, **options) or 0)

    def _run(self, given: list[str], *positional: Any, **options: Any) -> Any:
        try:
            code = super().main([word for word in given if word != "--debug"] or ["--help"], *positional, **options)
            if code == INTERRUPTED:  # before a command was at work
                _complain("interrupted", None)
        except typer.Abort as error:
            _complain("interrupted", error.__cause__)
            code = INTERRUPTED
        except Exception as error:
            explained = getattr(
                error, "format_message", None
            )  # misuse of the command line, for which typer has no class
            if "--debug" in given or not (explained or isinstance(error, EXPECTED)):
                raise
            _complain(f"error: {explained() if explained else _message(error)}", error)
            code = 2
        return code

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # typer keeps nothing of it but the exit code
            raise typer.Abort from error


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Warnings of this package are lines on stderr, each once; those of others stay what they are."""
    with warnings.catch_warnings():
        others, said = warnings.showwarning, set[str]()

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not category.__module__.startswith("ssm_interp."):
                others(message, category, *place, **more)
            elif str(message) not in said:
                said.add(str(message))
                _complain(f"warning: {message}", None)

        warnings.showwarning = show
        yield


def _message(error: Exception) -> str:
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error) or type(error).__name__
    from ssm_interp.flow import explain

    return explain(error)


def _complain(message: str, error: BaseException | None) -> None:
    parts = [message, *getattr(error, "__notes__", ())]
    text = parts[0] if len(parts) == 1 else ". ".join(part.removesuffix(".") for part in parts)
    typer.echo(" ".join(text.split()), err=True)


app = typer.Typer(cls=_Commands, add_completion=False, rich_markup_mode="rich")


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"ssm-interp {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    _debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Mechanistic interpretability of Mamba-1 and Mamba-2 language models."""


def main() -> None:
    """Entry point of the `ssm-interp` command."""
    try:
        app(prog_name="ssm-interp")
    except KeyboardInterrupt:
        _complain("interrupted", None)
        sys.exit(INTERRUPTED)
