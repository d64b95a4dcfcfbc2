"""`ssm-interp features`: the decay spectrum of one or several models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.table import Table

from ssm_interp import plots
from ssm_interp.cli.app import app, check_folder, console
from ssm_interp.cli.flow import DEFAULT, Columns, Ids, columns_of, option, progress_bar
from ssm_interp.features import STATISTICS, FeatureError, Spectrum, spectrum
from ssm_interp.features.groups import unknown_statistic
from ssm_interp.flow import Ranks, Study
from ssm_interp.flow.study import DeviceMap, Dtype
from ssm_interp.flow.study_run import StudyFacts, load_for
from ssm_interp.flow.sweep import device_of
from ssm_interp.hooks import attach
from ssm_interp.prompts import pad, tokenize

MODELS = ("tiny-mamba1", "tiny-mamba2")
Models = Annotated[list[str] | None, option("model", "--model", show_default="the embedded Mambas")]
Statistic = Annotated[
    list[str] | None,
    typer.Option("--statistic", help=f"Which ones: {', '.join(STATISTICS)}.", show_default="all"),
]


@app.command()
def features(
    model: Models = None,
    facts: Annotated[str, option("facts", "--facts", "--prompts")] = DEFAULT["facts"],
    column: Columns = None,
    skip_bad: Annotated[bool, option("skip_bad", "--skip-bad")] = DEFAULT["skip_bad"],
    limit: Annotated[int, option("limit", min=0)] = DEFAULT["limit"],
    seed: Annotated[int, option("seed")] = DEFAULT["seed"],
    id: Ids = None,
    statistic: Statistic = None,
    revision: Annotated[str, option("revision")] = DEFAULT["revision"],
    dtype: Annotated[Dtype, option("dtype")] = DEFAULT["dtype"],
    device: Annotated[str, option("device")] = DEFAULT["device"],
    device_map: Annotated[DeviceMap | None, option("device_map")] = DEFAULT["device_map"],
    batch_size: Annotated[int, option("batch_size", min=1)] = DEFAULT["batch_size"],
    out: Annotated[Path, typer.Option(help="Folder for table and figures.")] = Path("features"),
) -> None:
    """Measure what tells the features of each layer apart: decay, half-life, how far they look back, how dt varies.

    Features are channels in Mamba-1 and heads in Mamba-2. Prints the median and 5 to 95 % of them per layer; writes a
    table with a row per feature, and a figure. What these statistics rank, --features of flow knocks out, such as
    "top third by half-life".

    Options that name one thing can be repeated: --model --id --statistic --column.

    Example:  [bold]ssm-interp features --model tiny-mamba2 --statistic half-life --out spectrum[/bold]
    """
    options: dict[str, Any] = {
        "facts": facts,
        "columns": columns_of(column),
        "skip_bad": skip_bad,
        "limit": limit,
        "seed": seed,
        "ids": id,
        "revision": revision,
        "dtype": dtype,
        "device": device,
        "device_map": device_map,
        "batch_size": batch_size,
    }
    given = {name: value for name, value in options.items() if value is not None}
    names = model or list(MODELS)
    if len(set(names)) < len(names):
        raise FeatureError(f"give each --model once, got {', '.join(names)}")
    if unknown := [one for one in statistic or () if one not in STATISTICS]:
        raise FeatureError(unknown_statistic(unknown[0], STATISTICS))
    studies = [Study(model=name, **given) for name in names]
    check_folder(out)
    found = []
    with progress_bar(shown=True) as progress:
        task = progress.add_task("models", total=len(studies))
        for study in studies:
            found.append(_measured(study, statistic))
            progress.advance(task)
    _write(found, out)


def _measured(study: Study, statistics: list[str] | None) -> Spectrum:
    facts = StudyFacts(study)
    loaded, tokenizer = load_for(study, Ranks())
    with attach(loaded) as ssm:
        batch = pad([tokenize(prompt, tokenizer) for prompt in facts.askable(tokenizer, say=True)])
        return spectrum(
            ssm,
            batch.to(device_of(loaded)),
            statistics=statistics,
            batch_size=study.batch_size,
            name=study.model,
        )


def _write(found: list[Spectrum], out: Path) -> None:
    frame = pd.concat([one.frame() for one in found], ignore_index=True)
    figure = plots.spectrum_figure(frame)
    out.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(out / "features.parquet", index=False)
    figure.savefig(out / "features.png", dpi=200)
    figure.savefig(out / "features.svg")
    for one in found:
        _print(one)
    typer.echo(f"\nwrote {out / 'features.png'} (.svg) and {out / 'features.parquet'} ({len(frame)} rows)")


def _print(found: Spectrum) -> None:
    """A row per layer, a column per statistic: the median of the features, and below it 5 to 95 % of them."""
    read = f"{found.tokens} tokens" if found.tokens else "weights alone"
    typer.echo(f"\n{found.model} ({read}): median over the features of a layer; below it, 5 to 95 % of them")
    table = Table("layer")
    for name in found.statistics:
        table.add_column(name, justify="right")
    values = found.quantiles([0.05, 0.5, 0.95]).set_index(["statistic", "layer", "quantile"])["value"]
    for layer in next(iter(found.statistics.values())):
        numbers = [[_short(values[name, layer, q]) for q in (0.05, 0.5, 0.95)] for name in found.statistics]
        table.add_row(str(layer), *(f"{middle}\n{low} to {high}" for low, middle, high in numbers))
    console().print(table)


def _short(value: float) -> str:
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e+" in text else text
