"""`ssm-interp flow`: information-flow maps of one or several models."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from ssm_interp import plots
from ssm_interp.cli.ask import check_once
from ssm_interp.cli.output import console, folder, progress_bar, say
from ssm_interp.experiments import Flow, Study
from ssm_interp.experiments.values import Interval
from ssm_interp.flow import FlowResult, FlowRun, dropped_prompts, run_study, windows

LISTED = 3
"""Dropped prompts that are named on the console."""


def run(flow: Flow) -> None:
    """Runs the studies one after another, then writes and prints what they found together."""
    out = folder(flow.out, "figures, tables and what is stored")
    check_once(flow.model.names)
    studies, results = list(flow.studies()), []
    with progress_bar(shown=True) as progress:
        for study in studies:
            full = ", full answers: a forward per knockout" if study.full_answer else ""
            task = progress.add_task(f"{study.model}{full}", total=None)

            def report(done: int, total: int, task: Any = task) -> None:
                progress.update(task, completed=done, total=total)

            results.append(run_study(study, out, progress=report))
    result = FlowResult.join(results)
    picture, table = out / "flow.png", out / "flow.parquet"
    result.save(table)
    shown = flow.summary
    summary = result.summary(interval=shown.interval, level=shown.level)
    x_labels = {run.model: run.x_label for run in result.runs}
    figure = plots.flow_figure(summary, x_labels=x_labels, statistic=shown.statistic)
    figure.savefig(picture, dpi=200)
    figure.savefig(picture.with_suffix(".svg"))
    page = plots.flow_page(summary, x_labels=x_labels, statistic=shown.statistic)
    picture.with_suffix(".html").write_text(page, encoding="utf-8")
    print_flow(result, shown.interval, shown.level)
    if not flow.prompts.all_prompts:
        tell_dropped(zip(studies, results, strict=True), out)
    say(f"\nwrote {picture} (.svg, .html) and {table} ({len(result.frame)} rows)")


def tell_dropped(studies: Iterable[tuple[Study, FlowResult]], out: Path) -> Path | None:
    """Lists the prompts that models answered otherwise: a few on the console, all of them in a file, if there are any.

    Returns:
        The file.
    """
    frames = [dropped_prompts(study, result) for study, result in studies]
    file = out / "dropped.csv"
    frame = pd.concat(frames, ignore_index=True)
    if frame.empty:
        file.unlink(missing_ok=True)
        return None
    frame.to_csv(file, index=False)
    for model, rows in frame.groupby("model", sort=False):
        some = [
            f"{row.prompt_id} ({row.answered} instead of {row.answer})" for row in rows[:LISTED].itertuples(index=False)
        ]
        more = ", ..." if len(rows) > LISTED else ""
        say(f"{model} answers {len(rows)} otherwise, which are left out: {', '.join(some)}{more}; all are in {file}")
    return file


def print_flow(result: FlowResult, interval: Interval, level: float) -> None:
    """A table per model: the window with the largest drop for each source and target."""
    drops = result.largest_drops(interval=interval, level=level)
    for run in result.runs:
        sizes = ", ".join(map(str, run.windows))
        say(
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
    windows_of_run = windows(run.layers, row["window_size"], run.align)
    layers = next(window.layers for window in windows_of_run if window.at == row["layer"])
    between, interval = f"{_signed(row['low'])} to {_signed(row['high'])}", f"{100 * row['level']:g} %\ninterval"
    cells = {
        "largest\ndrop %": _signed(row["mean"]),
        interval: between if row["n"] > 1 else "(one prompt)",
        "\nmedian %": _signed(row["median"]),
        "still\nright %": f"{100 * row['accuracy']:.0f}",
        "in\nlayers": f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else str(layers[0]),
    }
    if float(f"{row['mean']:.1f}") >= 0:  # no window has a drop, so none is named
        cells |= dict.fromkeys(["largest\ndrop %", interval, "\nmedian %", "in\nlayers"], "\N{EN DASH}")
    if "metric" in row:
        cells |= {f"{row['metric']}\nchange": f"{row['value_difference']:+.3g}"}
    return cells | ({"without\nedges": f"{row['n_empty']} of {row['n']}"} if some_empty else {})


def _signed(percent: float) -> str:
    text = f"{percent:+.1f}"
    return text if float(text) else "0.0"
