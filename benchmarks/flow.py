"""Measure the fast engine, as ratios within one run, on random models of the 130M shape and on an embedded one.

    python -m benchmarks.flow                     # a few minutes on 2 cores
    python -m benchmarks.flow --profile           # and where the time of the batched step goes

192 variants of one 12-token prompt: 4 sources x 3 feature groups x 16 windows of 9 of 24 layers, each source -> last.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging

import ssm_interp as si
from benchmarks.__main__ import build
from benchmarks.memory import peak_megabytes
from ssm_interp.features import feature_groups
from ssm_interp.flow import Study, run_study
from ssm_interp.hooks import run_each

LENGTH, WINDOW, LAYERS = 12, 9, 24
SOURCES = {"subject": [2, 3, 4], "relation": [0, 1, 5, 6, 7, 8, 9, 10, 11], "first": [0], "last": [11]}
GROUPS = ("all", "top third", "all but bottom third")
PROMPTS = (10, 100, 1000)


def variants(ssm: si.Attachment) -> list[list[si.Knockout]]:
    """Every window of every feature group of every source, as knockouts."""
    groups = feature_groups(ssm, GROUPS)
    starts = range(LAYERS - WINDOW + 1)
    return [
        [si.Knockout(sources=s, targets=-1, layers=layer, features=g and g[layer]) for layer in range(w, w + WINDOW)]
        for s in SOURCES.values()
        for g in groups.values()
        for w in starts
    ]


def seconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, interleaved, after one round to warm up."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_:
                found[name].append(time.perf_counter() - start)
    return found


def calls(model: PreTrainedModel, ssm: si.Attachment) -> tuple[dict[str, Callable[[], object]], int]:
    """What is compared: the step, one hooked forward, and a plain forward over as many tokens as the step must read."""
    ids = torch.randint(0, model.config.vocab_size, (1, LENGTH))
    every = variants(ssm)
    tokens = LENGTH + len(every) // 2
    rows = torch.randint(0, model.config.vocab_size, (tokens // LENGTH, LENGTH))

    def step() -> None:
        for _ in run_each(ssm, ids, every):
            pass

    def hooked() -> object:
        with torch.no_grad(), ssm.edit(*every[0]):
            return ssm.model(input_ids=ids, use_cache=False)

    def plain() -> object:
        with torch.no_grad():
            return model(input_ids=rows, use_cache=False)

    return {"step": step, "hooked": hooked, "plain": plain}, len(every)


def ratios(name: str, repeats: int, profile: bool, console: Console) -> list[str]:
    """A row of the table: the model, median seconds, and medians of the ratios of neighbouring repeats."""
    model, twin = build(name), build(name)
    twin.load_state_dict(model.state_dict())
    with si.attach(twin) as ssm:
        compared, count = calls(model, ssm)
        found = seconds(compared, repeats)
        if profile:
            with torch.profiler.profile() as profiler:
                compared["step"]()
            console.print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))
    faster = statistics.median(count * h / s for h, s in zip(found["hooked"], found["step"], strict=True))
    slower = statistics.median(s / p for s, p in zip(found["step"], found["plain"], strict=True))
    medians = [f"{statistics.median(found[which]):.3f}" for which in ("step", "hooked", "plain")]
    return [name, *medians, f"{faster:.1f}", f"{slower:.2f}"]


def cost_per_prompt(count: int) -> None:
    """Run a study of an embedded model; print milliseconds per prompt, and how the process's peak grew, in MB."""
    with TemporaryDirectory() as folder:
        run_study(Study(model="tiny-mamba2", limit=8, seed=1), Path(folder, "warm"))
        before, start = peak_megabytes(), time.perf_counter()
        run_study(Study(model="tiny-mamba2", limit=count), Path(folder, "study"))
        spent = time.perf_counter() - start
    print(1000 * spent / count, peak_megabytes() - before)


def main(
    repeats: Annotated[int, typer.Option(help="Interleaved repeats.")] = 5,
    profile: Annotated[bool, typer.Option(help="Print where the step's time goes.")] = False,
    prompts: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Print the ratios."""
    if prompts:
        cost_per_prompt(prompts)
        return
    logging.set_verbosity_error()
    console = Console(width=140)
    title = f"192 knockouts of a {LENGTH}-token prompt, {torch.get_num_threads()} threads"
    table = Table(
        "model", "step s", "hooked forward s", "plain forward s", "x faster than 192", "x of plain", title=title
    )
    for name in ("mamba1-130m", "mamba2-130m"):
        table.add_row(*ratios(name, repeats, profile, console))
    console.print(table)
    table = Table(
        "prompts", "ms per prompt", "growth of the peak, MB", title="a study of tiny-mamba2, 28 knockouts each"
    )
    for count in PROMPTS:
        command = [sys.executable, "-m", "benchmarks.flow", "--prompts", str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        table.add_row(str(count), *(f"{float(value):.1f}" for value in done))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
