"""What taking mixers apart costs, as ratios within one run, on random models of the 130M shape.

    python -m benchmarks.decomposition
    python -m benchmarks.decomposition --length 64 --repeats 3

Times are medians of interleaved repeats. With them come the relative errors of the sums against the host's own output.
"""

from __future__ import annotations

from typing import Annotated, Any

import cyclopts
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import ssm_interp as si
from benchmarks.__main__ import build, ratio
from ssm_interp.attribution import MixerRecord, decompose, logit_attribution, record_mixers
from ssm_interp.scan import attention_rows, unified_rows


def unified_last_row(record: MixerRecord) -> torch.Tensor:
    """What the last position reads of the convolution's inputs, D, gate and the bias's column included."""
    row = attention_rows(record.terms, [-1])
    row[..., -1] += record.skip[:, 0, None]
    return unified_rows(row, record.convolution, record.secant, record.gate[:, -1:])


def rows(name: str, length: int, repeats: int) -> list[tuple[str, float, float, float]]:
    """Rows (what, seconds of what it is compared with, seconds, ratio) for one model."""
    model = build(name)
    ids = torch.randint(0, 50280, (1, length))
    with si.attach(model) as ssm:
        record = record_mixers(ssm, ids, layers=12)[12]

        def unified() -> object:
            for cached in ("gate", "secant"):  # count what a first call computes
                record.__dict__.pop(cached, None)
            return unified_last_row(record)

        def forward() -> object:
            return model(input_ids=ids, use_cache=False)

        variants: dict[str, Any] = {
            "decompose the last token by source, 24 layers / forward": lambda: decompose(ssm, ids),
            "decompose the last token by input, 24 layers / forward": lambda: decompose(ssm, ids, by="input"),
            "logit_attribution, 24 layers / forward": lambda: logit_attribution(ssm, ids, 5, 9),
        }
        found = [(what, *ratio(forward, call, repeats)) for what, call in variants.items()]
        return [
            (
                "unified row / SSM row, last token, one layer",
                *ratio(lambda: attention_rows(record.terms, [-1]), unified, 5 * repeats),
            ),
            *found,
        ]


def error(name: str, length: int, by: Any) -> float:
    """The largest deviation of a sum of parts from the host's output, relative to the largest output, over layers."""
    with si.attach(build(name)) as ssm:
        parts = decompose(ssm, torch.randint(0, 50280, (1, length)), by=by).values()
        return max(float(one.rest.abs().max() / one.whole.abs().max()) for one in parts)


def main(
    length: Annotated[int, cyclopts.Parameter(help="Tokens in the prompt.")] = 128,
    repeats: Annotated[int, cyclopts.Parameter(help="Interleaved repeats of each pair.")] = 3,
) -> None:
    """Print the ratios and the errors."""
    logging.set_verbosity_error()
    console = Console(width=120)
    title = f"{length} tokens, {torch.get_num_threads()} threads"
    table = Table("model", "what", "s of the latter", "s", "ratio", title=title)
    errors = Table("model", "by", "relative error", title="sums of the parts against the host's output, fp32")
    with torch.no_grad():
        for name in ("mamba1-130m", "mamba2-130m"):
            for what, first, second, quotient in rows(name, length, repeats):
                table.add_row(name, what, f"{first:.4f}", f"{second:.4f}", f"{quotient:.2f}")
            for by in ("source", "input"):
                errors.add_row(name, by, f"{error(name, length, by):.1e}")
    console.print(table)
    console.print(errors)


if __name__ == "__main__":
    cyclopts.run(main)
