"""`ssm-interp flow`: information-flow maps of one or several models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ssm_interp.cli.options import (
    DEFAULT,
    Address,
    Alignment,
    BatchSize,
    Columns,
    Device,
    Facts,
    Features,
    FullAnswer,
    GpusPerWorker,
    Ids,
    Limit,
    MaxMemory,
    OfType,
    Revision,
    Seed,
    SkipBad,
    Spread,
    Through,
    Workers,
    option,
    studies,
)
from ssm_interp.cli.output import check_folder, console, progress_bar
from ssm_interp.flow import FlowResult, FlowRun, Study, run_study, windows
from ssm_interp.models import EMBEDDED

Models = Annotated[list[str] | None, option("model", "--model", show_default="the embedded ones")]
Sources = Annotated[list[str] | None, option("sources", "--source", show_default="subject relation first last")]
Targets = Annotated[list[str] | None, option("targets", "--target", show_default="last")]
Windows = Annotated[list[int] | None, option("windows", "--window", show_default="three in eight of the layers")]
ShardSize = Annotated[int, option("shard_size", min=1)]


def flow(
    model: Models = None,
    facts: Facts = DEFAULT["facts"],
    column: Columns = None,
    skip_bad: SkipBad = DEFAULT["skip_bad"],
    limit: Limit = DEFAULT["limit"],
    seed: Seed = DEFAULT["seed"],
    id: Ids = None,
    full_answer: FullAnswer = DEFAULT["full_answer"],
    source: Sources = None,
    target: Targets = None,
    window: Windows = None,
    align: Alignment = DEFAULT["align"],
    features: Features = None,
    through: Through = None,
    revision: Revision = DEFAULT["revision"],
    dtype: OfType = DEFAULT["dtype"],
    device: Device = DEFAULT["device"],
    device_map: Spread = DEFAULT["device_map"],
    batch_size: BatchSize = DEFAULT["batch_size"],
    shard_size: ShardSize = DEFAULT["shard_size"],
    max_memory: MaxMemory = DEFAULT["max_memory"],
    workers: Workers = DEFAULT["workers"],
    gpus_per_worker: GpusPerWorker = DEFAULT["gpus_per_worker"],
    address: Address = DEFAULT["address"],
    out: Annotated[Path, typer.Option(help="Folder for figures, table, shards.")] = Path("flow"),
) -> None:
    """Draw an information-flow map: where in the layers each part of a prompt reaches the answer.

    Asks each model for facts, keeps those it answers correctly, and knocks out source -> target in every layer window.
    Prints the largest drop of the answer's probability per source; writes figures and a table of every number.
    Interrupted, the same command goes on where it was; with --workers, processes share the prompts.

    Options that name one thing can be repeated: --model --id --source --target --window --features --through --column.

    Example:  [bold]ssm-interp flow --model tiny-mamba2 --source subject --source last --window 3 --out map[/bold]
    """
    run_studies(studies(model or EMBEDDED, locals()), out)


def run_studies(asked: Sequence[Study], out: Path) -> None:
    """Run studies one after another, then write and print what they found together.

    Raises:
        OSError: the folder cannot be written; else as `run_study`.
    """
    check_folder(out)
    results = []
    with progress_bar(shown=True) as progress:
        for study in asked:
            full = ", full answers: a forward per knockout" if study.full_answer else ""
            task = progress.add_task(f"{study.model}{full}", total=None)

            def report(done: int, total: int, task: Any = task) -> None:
                progress.update(task, completed=done, total=total)

            results.append(run_study(study, out, progress=report))
    result = FlowResult.join(results)
    picture, table = out / "flow.png", out / "flow.parquet"
    result.save(table)
    figure = result.plot()
    figure.savefig(picture, dpi=200)
    figure.savefig(picture.with_suffix(".svg"))
    picture.with_suffix(".html").write_text(result.page(), encoding="utf-8")
    print_flow(result)
    typer.echo(f"\nwrote {picture} (.svg, .html) and {table} ({len(result.frame)} rows)")


def print_flow(result: FlowResult) -> None:
    """A table per model: the window with the largest drop for each source and target."""
    drops = result.largest_drops()
    for run in result.runs:
        sizes = ", ".join(map(str, run.windows))
        typer.echo(
            f"\n{run.model}: {run.kept} of {run.asked} prompts answered correctly and kept{_asked_for(result, run)}; "
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


def _asked_for(result: FlowResult, run: FlowRun) -> str:
    """What of the answers was asked for, where some have several tokens."""
    if run.full_answer:
        return ", every token of the answer asked for"
    rows = result.frame[result.frame["model"] == run.model].drop_duplicates("prompt_id")
    partly = rows[rows["unasked"] > 0]
    if partly.empty:
        return ""
    example = partly["answer"].iloc[0]
    return f", {len(partly)} of them asked for the first token of their answer alone (such as {example}; --full-answer)"


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
    if float(f"{row['mean']:.1f}") >= 0:  # no window has a drop, so none is named
        cells |= dict.fromkeys(["largest\ndrop %", "95 %\ninterval", "\nmedian %", "in\nlayers"], "\N{EN DASH}")
    return cells | ({"without\nedges": f"{row['n_empty']} of {row['n']}"} if some_empty else {})


def _signed(percent: float) -> str:
    text = f"{percent:+.1f}"
    return text if float(text) else "0.0"
