"""`ssm-interp features`: the decay spectrum of one or several models."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence

from ssm_interp import plots
from ssm_interp.cli.ask import check_once, drawn, loaded
from ssm_interp.cli.output import console, folder, progress_bar, say, wrote
from ssm_interp.experiments import Features
from ssm_interp.features import Spectrum, spectrum
from ssm_interp.hooks import attach
from ssm_interp.hooks.rows.asked import device_of
from ssm_interp.prompts import Prompt, encode


def run(features: Features) -> None:
    """Prints quantiles per layer; writes a table and a figure."""
    out = folder(features.out, "a table and figures")
    check_once(features.model.names)
    prompts = drawn(features.prompts)
    spectra = []
    with progress_bar(shown=True, unit="models") as progress:
        task = progress.add_task("models", total=len(features.model.names))
        for name in features.model.names:
            spectra.append(_measured(name, features, prompts))
            progress.advance(task)
    _write(spectra, out)


def _measured(name: str, features: Features, prompts: list[Prompt]) -> Spectrum:
    host, tokenizer = loaded(name, features.model, features.computed)
    texts = [torch.tensor(encode(prompt.text, tokenizer).ids) for prompt in prompts]
    inputs = {
        "input_ids": pad_sequence(texts, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
    }
    with attach(host) as ssm:
        return spectrum(
            ssm,
            {name: tensor.to(device_of(host)) for name, tensor in inputs.items()},
            statistics=features.statistics,
            batch_size=features.computed.batch_size,
            name=name,
        )


def _write(spectra: list[Spectrum], out: Path) -> None:
    frame = pd.concat([measured.frame for measured in spectra], ignore_index=True)
    figure = plots.spectrum_figure(frame)
    picture, table = out / "features.png", out / "features.parquet"
    verb = wrote(picture, table)
    out.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(table, index=False)
    figure.savefig(picture, dpi=200)
    figure.savefig(picture.with_suffix(".svg"))
    for measured in spectra:
        _print(measured)
    say(f"\n{verb} {picture} (.svg) and {table} ({len(frame)} rows)")


def _print(measured: Spectrum) -> None:
    """A row per layer, a column per statistic: the median of the features, and below it 5 to 95 % of them."""
    read = f"{measured.n_tokens} tokens" if measured.n_tokens else "weights alone"
    say(f"\n{measured.model} ({read}): median over the features of a layer; below it, 5 to 95 % of them")
    table = Table("layer")
    for name in measured.statistics:
        table.add_column(name, justify="right")
    values = measured.quantiles([0.05, 0.5, 0.95]).set_index(["statistic", "layer", "quantile"])["value"]
    for layer in next(iter(measured.statistics.values())):
        numbers = [[_short(values[name, layer, q]) for q in (0.05, 0.5, 0.95)] for name in measured.statistics]
        table.add_row(str(layer), *(f"{middle}\n{low} to {high}" for low, middle, high in numbers))
    console().print(table)


def _short(value: float) -> str:
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e+" in text else text
