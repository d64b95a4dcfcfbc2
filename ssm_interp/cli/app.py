"""What the commands share: the app, its errors, its console, its checks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.utils import logging as hub_logging
from pydantic import ValidationError
from rich.console import Console
from transformers.utils import logging as transformers_logging
from typer.core import TyperGroup

from ssm_interp import __version__
from ssm_interp.flow import explain

EXPECTED = (ValueError, RuntimeError, OSError, ImportError, MemoryError)
INTERRUPTED = 130


class _Commands(TyperGroup):
    """Every error is one line on stderr and exit code 2; with `--debug`, wherever it stands, its traceback."""

    def main(self, args: Sequence[str] | None = None, *positional: Any, **options: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        options["standalone_mode"] = False
        try:
            code = super().main([word for word in given if word != "--debug"] or ["--help"], *positional, **options)
        except typer.Abort as error:
            _complain("interrupted", error)
            code = INTERRUPTED
        except Exception as error:
            explained = getattr(
                error, "format_message", None
            )  # misuse of the command line, for which typer has no class
            if "--debug" in given or not (explained or isinstance(error, EXPECTED)):
                raise
            _complain(f"error: {explained() if explained else _message(error)}", error)
            code = 2
        sys.exit(code or 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # typer keeps nothing of it but the exit code
            _complain("interrupted", error)
            raise typer.Exit(INTERRUPTED) from None


def _message(error: Exception) -> str:
    return (explain(error) if isinstance(error, ValidationError) else str(error)) or type(error).__name__


def _complain(message: str, error: BaseException | None) -> None:
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    parts = [message, *getattr(error, "__notes__", ())]
    text = parts[0] if len(parts) == 1 else ". ".join(part.removesuffix(".") for part in parts)
    typer.echo(rank + " ".join(text.split()), err=True)


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
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def check_folder(folder: Path) -> None:
    """Raise OSError, before the work, if files cannot be written to a folder that may not exist yet."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"cannot write to {folder}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"cannot write to {folder}: no permission to write in {nearest}")


def console() -> Console:
    """On stdout, wide enough not to break the lines of a table that is piped into a file."""
    on_stdout = Console()
    return on_stdout if on_stdout.is_terminal else Console(width=120)


def main() -> None:
    """Entry point of the `ssm-interp` command."""
    app(prog_name="ssm-interp")
