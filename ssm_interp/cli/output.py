"""What the commands write: files that can be written, the console, and a progress bar."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PICTURES, PAGE, TABLES = (".png", ".svg", ".pdf"), ".html", (".parquet", ".csv")
RATE_OVER = 600.0
"""Seconds over which the progress bar averages: prompts come in bursts."""


def say(text: str) -> None:
    """A line on stdout."""
    sys.stdout.write(f"{text}\n")


def tell(text: str) -> None:
    """A line on stderr: what is not what was asked for."""
    sys.stderr.write(f"{text}\n")


def folder(out: Path, holds: str) -> Path:
    """A folder for several files, that can be written.

    Raises:
        ValueError: it is named like a picture or a table.
        OSError: it cannot be written.
    """
    if out.suffix in (*PICTURES, PAGE, *TABLES) and not out.is_dir():
        raise ValueError(f"--out {out}: it is a folder here, for {holds}; name one without {out.suffix}")
    check_folder(out)
    return out


def check_folder(folder: Path) -> None:
    """Raise OSError, before the work, if files cannot be written to a folder that may not exist yet."""
    nearest = next(nearest for nearest in (folder, *folder.absolute().parents) if nearest.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"cannot write to {folder}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"cannot write to {folder}: no permission to write in {nearest}")


def picture(out: Path, example: str, suffixes: tuple[str, ...] = (*PICTURES, PAGE)) -> Path:
    """A file to draw into: with a suffix, in a folder that can be written.

    Raises:
        ValueError: another suffix.
        OSError: it is a folder, or cannot be written.
    """
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; name a picture, such as {out / example}")
    named = out if out.suffix else out.with_suffix(".png")
    if named.suffix not in suffixes:
        raise ValueError(f"--out {out}: the suffix is one of {', '.join(suffixes)}")
    check_folder(out.parent)
    return named


def picture_and_table(out: Path, example: str, table: str) -> tuple[Path, Path]:
    """A picture and a table beside it, one of which the user named; `table` is the suffix of one that has no name."""
    named = picture(out, example, (*PICTURES, PAGE, *TABLES))
    return (named.with_suffix(".png"), named) if named.suffix in TABLES else (named, named.with_suffix(table))


def draw(out: Path, plot: Callable[..., Figure], page: Callable[..., str], **options: Any) -> None:
    """Into a picture or an interactive page, whichever the suffix says, with the options that both take."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == PAGE:
        out.write_text(page(**options), encoding="utf-8")
    else:
        plot(**options).savefig(out, dpi=200)


def write_table(frame: pd.DataFrame, table: Path) -> None:
    """As what its suffix says."""
    frame.to_csv(table, index=False) if table.suffix == ".csv" else frame.to_parquet(table, index=False)


def wrote(*files: Path) -> str:
    """The verb for files that are about to be written: another one where an earlier file goes."""
    return "overwrote" if any(file.exists() for file in files) else "wrote"


def console() -> Console:
    """On stdout, wide enough not to break the lines of a table that is piped into a file."""
    on_stdout = Console()
    return on_stdout if on_stdout.is_terminal else Console(width=120)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g} {self.unit}/s" if task.speed else "")


@contextmanager
def progress_bar(*, shown: bool, unit: str = "prompts") -> Iterator[Progress]:
    """Units done, their rate and the time left, on stderr; nothing where that is no terminal, or not to be shown."""
    on_stderr = Console(stderr=True)
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    disable = not (shown and on_stderr.is_terminal)
    with Progress(*columns, console=on_stderr, disable=disable, speed_estimate_period=RATE_OVER) as progress:
        yield progress
