"""Measure what hooking costs, as ratios within one run, on random models of the 130M shape.

    python -m benchmarks                     # everything, a few minutes on 2 cores
    python -m benchmarks --length 64 --repeats 3

Times are medians of interleaved repeats (plain, variant, plain, variant, ...), so a machine that slows down slows both.
Memory is the growth of the peak of a fresh process.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated

import cyclopts
import torch
from rich.console import Console
from rich.table import Table
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel
from transformers.utils import logging

import ssm_interp as si
from benchmarks.memory import CASES

WINDOW = range(8, 17)  # 9 of 24 layers


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "mamba1-130m":
        return MambaForCausalLM(MambaConfig(hidden_size=768, num_hidden_layers=24)).eval()
    shape = {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "head_dim": 64, "n_groups": 1}
    return Mamba2ForCausalLM(Mamba2Config(**shape, vocab_size=50280)).eval()


def ratio(plain: Callable[[], object], other: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the ratios of neighbouring repeats."""
    plain(), other()
    pairs = [(_seconds(plain), _seconds(other)) for _ in range(repeats)]
    return (
        statistics.median(first for first, _ in pairs),
        statistics.median(second for _, second in pairs),
        statistics.median(second / first for first, second in pairs),
    )


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def speed(name: str, length: int, repeats: int) -> list[tuple[str, float, float, float]]:
    """Rows (what, plain seconds, seconds, ratio) for one model."""
    model, twin = build(name), build(name)
    twin.load_state_dict(model.state_dict())
    ids = torch.randint(0, 50280, (1, length))
    ssm = si.attach(twin)
    knockout = si.Knockout(sources=[2, 3], targets=-1, layers=WINDOW)
    whole = si.Knockout(sources=range(0, length // 2), targets=range(length // 2, length), layers=WINDOW)

    def plain() -> object:
        return model(input_ids=ids, use_cache=False)

    def hooked(*edits: si.Intervention) -> object:
        with ssm.edit(*edits) if edits else nullcontext():
            return twin(input_ids=ids, use_cache=False)

    variants = {
        "attached, idle": hooked,
        "knockout, 2 sources -> last, 9 of 24 layers": lambda: hooked(knockout),
        "knockout, first half -> second half, 9 of 24 layers": lambda: hooked(whole),
        "one layer's attention materialised": lambda: ssm.run(ids, read="attn", layers=12, use_cache=False),
    }
    return [(what, *ratio(plain, call, repeats)) for what, call in variants.items()]


def main(
    length: Annotated[int, cyclopts.Parameter(help="Tokens in the prompt.")] = 128,
    repeats: Annotated[int, cyclopts.Parameter(help="Interleaved repeats of each pair.")] = 15,
) -> None:
    """Print the ratios."""
    logging.set_verbosity_error()
    console = Console(width=120)
    table = Table(
        "model", "what", "plain s", "s", "ratio", title=f"time, {length} tokens, {torch.get_num_threads()} threads"
    )
    with torch.no_grad():
        for name in ("mamba1-130m", "mamba2-130m"):
            for what, first, second, quotient in speed(name, length, repeats):
                table.add_row(name, what, f"{first:.3f}", f"{second:.3f}", f"{quotient:.3f}")
    console.print(table)
    table = Table(
        "what", "seconds", "peak growth MB", "result MB", "peak / result", title="one Mamba-1 layer, h 1536, n 16"
    )
    for case in CASES:
        found = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", case], check=True, capture_output=True, text=True
        ).stdout.split()
        seconds, peak, result = (float(value) for value in found)
        table.add_row(case, f"{seconds:.2f}", f"{peak:.0f}", f"{result:.1f}", f"{peak / result:.2f}")
    console.print(table)


if __name__ == "__main__":
    cyclopts.run(main)
