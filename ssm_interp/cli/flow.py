"""`ssm-interp flow`: information-flow maps of one or several models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
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
from rich.table import Table
from rich.text import Text

from ssm_interp.cli.app import app, check_folder, console
from ssm_interp.flow import Align, FlowError, FlowResult, FlowRun, Study, StudyError, ranks, run_study, windows
from ssm_interp.flow.study import DeviceMap, Dtype
from ssm_interp.models import EMBEDDED

RATE_OVER = 600.0
"""Seconds over which the progress bar averages: prompts come in bursts."""


def option(field: str, *names: str, **more: Any) -> Any:
    """An option of a study, with the description that it has there."""
    return typer.Option(*names, help=Study.model_fields[field].description, **more)


DEFAULT: dict[str, Any] = {name: field.default for name, field in Study.model_fields.items()}


Models = Annotated[list[str] | None, option("model", "--model", show_default="the embedded ones")]
Columns = Annotated[
    list[str] | None, option("columns", "--column", metavar="FIELD=COLUMN", show_default="the fields' own names")
]
Ids = Annotated[list[str] | None, option("ids", "--id", show_default="all")]
Sources = Annotated[list[str] | None, option("sources", "--source", show_default="subject relation first last")]
Targets = Annotated[list[str] | None, option("targets", "--target", show_default="last")]
Windows = Annotated[list[int] | None, option("windows", "--window", show_default="three in eight of the layers")]
Features = Annotated[list[str] | None, option("features", "--features", show_default="all")]
Through = Annotated[list[str] | None, option("through", "--through", show_default="ssm where the model has it")]


@app.command()
def flow(
    model: Models = None,
    facts: Annotated[str, option("facts", "--facts", "--prompts")] = DEFAULT["facts"],
    column: Columns = None,
    skip_bad: Annotated[bool, option("skip_bad", "--skip-bad")] = DEFAULT["skip_bad"],
    limit: Annotated[int, option("limit", min=0)] = DEFAULT["limit"],
    seed: Annotated[int, option("seed")] = DEFAULT["seed"],
    id: Ids = None,
    source: Sources = None,
    target: Targets = None,
    window: Windows = None,
    align: Annotated[Align, option("align")] = DEFAULT["align"],
    features: Features = None,
    through: Through = None,
    revision: Annotated[str, option("revision")] = DEFAULT["revision"],
    dtype: Annotated[Dtype, option("dtype")] = DEFAULT["dtype"],
    device: Annotated[str, option("device")] = DEFAULT["device"],
    device_map: Annotated[DeviceMap | None, option("device_map")] = DEFAULT["device_map"],
    batch_size: Annotated[int, option("batch_size", min=1)] = DEFAULT["batch_size"],
    shard_size: Annotated[int, option("shard_size", min=1)] = DEFAULT["shard_size"],
    max_memory: Annotated[str | None, option("max_memory", metavar="BYTES")] = DEFAULT["max_memory"],
    out: Annotated[Path, typer.Option(help="Folder for figures, table, shards.")] = Path("flow"),
) -> None:
    """Draw an information-flow map: where in the layers each part of a prompt reaches the answer.

    Asks each model for facts, keeps those it answers correctly, and knocks out source -> target in every layer window.
    Prints the largest drop of the answer's probability per source; writes figures and a table of every number.
    Interrupted, the same command goes on where it was; under torchrun or accelerate launch, ranks share the prompts.

    Options that name one thing can be repeated: --model --id --source --target --window --features --through --column.

    Example:  [bold]ssm-interp flow --model tiny-mamba2 --source subject --source last --window 3 --out map[/bold]
    """
    options: dict[str, Any] = {
        "facts": facts,
        "columns": columns_of(column),
        "skip_bad": skip_bad,
        "limit": limit,
        "seed": seed,
        "ids": id,
        "sources": source,
        "targets": target,
        "windows": window,
        "align": align,
        "features": features,
        "through": through,
        "revision": revision,
        "dtype": dtype,
        "device": device,
        "device_map": device_map,
        "batch_size": batch_size,
        "shard_size": shard_size,
        "max_memory": max_memory,
    }
    given = {name: value for name, value in options.items() if value is not None}
    names = model or list(EMBEDDED)
    if len(set(names)) < len(names):
        raise FlowError(f"give each --model once, got {', '.join(names)}")
    run_studies([Study(model=name, **given) for name in names], out)


def run_studies(studies: Sequence[Study], out: Path) -> None:
    """Run studies one after another, then write and print what they found together; on rank 0, if there are several.

    Raises:
        OSError: the folder cannot be written; else as `run_study`.
    """
    check_folder(out)
    with ranks() as peers:
        results = []
        with progress_bar(shown=peers.index == 0) as progress:
            for study in studies:
                task = progress.add_task(study.model, total=None)

                def report(done: int, total: int, task: Any = task) -> None:
                    progress.update(task, completed=done, total=total)

                results.append(run_study(study, out, progress=report))
        if peers.index:
            return
    result = FlowResult.join(results)
    result.save(out / "flow.parquet")
    figure = result.plot()
    figure.savefig(out / "flow.png", dpi=200)
    figure.savefig(out / "flow.svg")
    (out / "flow.html").write_text(result.page(), encoding="utf-8")
    print_flow(result)
    typer.echo(f"\nwrote {out / 'flow.png'} (.svg, .html) and {out / 'flow.parquet'} ({len(result.frame)} rows)")


def columns_of(pairs: list[str] | None) -> dict[str, str] | None:
    """FIELD=COLUMN options as a mapping; None stays None."""
    if pairs is None:
        return None
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise StudyError(f"--column {wrong[0]}: give FIELD=COLUMN, such as text=question")
    return {field: column for field, _, column in (pair.partition("=") for pair in pairs)}


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g} prompts/s" if task.speed else "")


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[Progress]:
    """Prompts done, their rate and the time left, on stderr; nothing where that is no terminal, or not to be shown."""
    on_stderr = Console(stderr=True)
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    disable = not (shown and on_stderr.is_terminal)
    with Progress(*columns, console=on_stderr, disable=disable, speed_estimate_period=RATE_OVER) as progress:
        yield progress


def print_flow(result: FlowResult) -> None:
    """A table per model: the window with the largest drop for each source and target."""
    drops = result.largest_drops()
    for run in result.runs:
        sizes = ", ".join(map(str, run.windows))
        typer.echo(
            f"\n{run.model}: {run.kept} of {run.asked} prompts answered correctly and kept; "
            f"windows of {sizes} of {len(run.layers)} layers"
        )
        rows = drops[drops["model"] == run.model]
        table = Table("\nsource \N{RIGHTWARDS ARROW} target")
        cells = [_cells(row, run, some_empty=bool(rows["n_empty"].any())) for _, row in rows.iterrows()]
        for header in cells[0]:
            table.add_column(header, justify="right", no_wrap=True)
        for (_, row), values in zip(rows.iterrows(), cells, strict=True):
            group = "" if set(rows["feature_group"]) == {"all"} else f", {row['feature_group']}"
            table.add_row(f"{row['source']} \N{RIGHTWARDS ARROW} {row['target']}{group}", *values.values())
        console().print(table)


def _cells(row: Any, run: FlowRun, *, some_empty: bool) -> dict[str, str]:
    places = windows(run.layers, row["window_size"], run.align)
    layers = next(place.layers for place in places if place.at == row["layer"])
    cells = {
        "largest\ndrop %": _signed(row["mean"]),
        "95 %\ninterval": f"{_signed(row['low'])} to {_signed(row['high'])}" if row["n"] > 1 else "(one prompt)",
        "\nmedian %": _signed(row["median"]),
        "still\nright %": f"{100 * row['accuracy']:.0f}",
        "in\nlayers": f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else str(layers[0]),
    }
    return cells | ({"without\nsource": f"{row['n_empty']} of {row['n']}"} if some_empty else {})


def _signed(percent: float) -> str:
    text = f"{percent:+.1f}"
    return text if float(text) else "0.0"
