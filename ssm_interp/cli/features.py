"""`ssm-interp features`: the decay spectrum of one or several models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence

from ssm_interp import plots
from ssm_interp.cli.options import (
    DEFAULT,
    BatchSize,
    Columns,
    Device,
    Facts,
    Ids,
    Limit,
    OfType,
    Revision,
    Seed,
    SkipBad,
    Spread,
    option,
    studies,
)
from ssm_interp.cli.output import check_folder, console, progress_bar, wrote
from ssm_interp.errors import FeatureError
from ssm_interp.features import STATISTICS, Spectrum, spectrum
from ssm_interp.features.groups import unknown_statistic
from ssm_interp.flow import Study
from ssm_interp.flow.study_facts import StudyFacts
from ssm_interp.flow.study_job import load_for
from ssm_interp.hooks import attach
from ssm_interp.hooks.answers import device_of
from ssm_interp.prompts import encode

MODELS = ("tiny-mamba1", "tiny-mamba2")
Models = Annotated[list[str] | None, option("model", "--model", show_default="the embedded Mambas")]
Statistic = Annotated[
    list[str] | None,
    typer.Option("--statistic", help=f"Which ones: {', '.join(STATISTICS)}.", show_default="all"),
]


def features(
    model: Models = None,
    facts: Facts = DEFAULT["facts"],
    column: Columns = None,
    skip_bad: SkipBad = DEFAULT["skip_bad"],
    limit: Limit = DEFAULT["limit"],
    seed: Seed = DEFAULT["seed"],
    id: Ids = None,
    statistic: Statistic = None,
    revision: Revision = DEFAULT["revision"],
    dtype: OfType = DEFAULT["dtype"],
    device: Device = DEFAULT["device"],
    device_map: Spread = DEFAULT["device_map"],
    batch_size: BatchSize = DEFAULT["batch_size"],
    out: Annotated[Path, typer.Option(help="Folder for table and figures.")] = Path("features"),
) -> None:
    """Measure what tells the features of each layer apart: decay, half-life, reach, variation of dt.

    Features are channels in Mamba-1 and heads in Mamba-2. Prints the median and 5 to 95 % of them per layer; writes a
    table with a row per feature, and a figure. What these statistics rank, --features of flow knocks out, such as
    "top third by half-life".

    Options that name one thing can be repeated: --model --id --statistic --column.

    Example:  [bold]ssm-interp features --model tiny-mamba2 --statistic half-life --out spectrum[/bold]
    """
    asked = studies(model or MODELS, locals())
    if unknown := [one for one in statistic or () if one not in STATISTICS]:
        raise FeatureError(unknown_statistic(unknown[0], STATISTICS))
    check_folder(out)
    found = []
    with progress_bar(shown=True, unit="models") as progress:
        task = progress.add_task("models", total=len(asked))
        for study in asked:
            found.append(_measured(study, statistic))
            progress.advance(task)
    _write(found, out)


def _measured(study: Study, statistics: list[str] | None) -> Spectrum:
    facts = StudyFacts(study)
    if facts.bad:
        typer.echo(f"{study.facts}: rows left out: {len(facts.bad)}, no prompts; first: {facts.bad[0]}", err=True)
    loaded, tokenizer = load_for(study)
    texts = [torch.tensor(encode(prompt.text, tokenizer).ids) for prompt in facts.prompts]
    inputs = {
        "input_ids": pad_sequence(texts, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
    }
    with attach(loaded) as ssm:
        return spectrum(
            ssm,
            {name: tensor.to(device_of(loaded)) for name, tensor in inputs.items()},
            statistics=statistics,
            batch_size=study.batch_size,
            name=study.model,
        )


def _write(found: list[Spectrum], out: Path) -> None:
    frame = pd.concat([one.frame for one in found], ignore_index=True)
    figure = plots.spectrum_figure(frame)
    picture, table = out / "features.png", out / "features.parquet"
    verb = wrote(picture, table)
    out.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(table, index=False)
    figure.savefig(picture, dpi=200)
    figure.savefig(picture.with_suffix(".svg"))
    for one in found:
        _print(one)
    typer.echo(f"\n{verb} {picture} (.svg) and {table} ({len(frame)} rows)")


def _print(found: Spectrum) -> None:
    """A row per layer, a column per statistic: the median of the features, and below it 5 to 95 % of them."""
    read = f"{found.n_tokens} tokens" if found.n_tokens else "weights alone"
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
