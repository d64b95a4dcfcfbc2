"""Measure the fast engine, as ratios within one run, on random models of the 130M shape.

    python -m benchmarks.flow                     # a quarter of an hour on 2 cores
    python -m benchmarks.flow --profile           # and where the time of the batched step goes

192 variants of one 12-token prompt: 4 sources x 3 feature groups x 16 windows of 9 of 24 layers, each source -> last.
Then sweeps of 16 of them over 10, 100 and 1,000 such prompts, in batches of 8 and of 32: what a prompt costs, and the
memory of the process.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated

import cyclopts
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

import ssm_interp as si
from benchmarks.__main__ import build
from benchmarks.memory import peak_megabytes
from ssm_interp.features import feature_groups
from ssm_interp.flow import sweep
from ssm_interp.hooks.rows.engine import run_each
from ssm_interp.prompts import Prompt

LENGTH, WINDOW, LAYERS = 12, 9, 24
SOURCES = {"subject": [2, 3, 4], "relation": [0, 1, 5, 6, 7, 8, 9, 10, 11], "first": [0], "last": [11]}
GROUPS = ("all", "top third", "all but bottom third")
PROMPTS = (10, 100, 1000)
BATCHES = (8, 32)
MODELS = ("mamba1-130m", "mamba2-130m")


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


def cost_per_prompt(name: str, count: int, batch_size: int) -> None:
    """Sweep so many prompts; print milliseconds per prompt, and the process's peak before and after, in MB."""
    model = build(name)
    words = PreTrainedTokenizerFast(tokenizer_object=_words(model.config.vocab_size), pad_token="w0", unk_token="w0")
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(1, model.config.vocab_size, (count, LENGTH + 1), generator=draw).tolist()
    named = [[f"w{word}" for word in row] for row in rows]
    prompts = [Prompt(" ".join(row[:-1]), subject=" ".join(row[2:5]), answer=row[-1]) for row in named]
    with si.attach(model) as ssm:
        before, start = peak_megabytes(), time.perf_counter()
        sweep(ssm, words, prompts, sources=["subject"], windows=WINDOW, answered_only=False, batch_size=batch_size)
        spent = time.perf_counter() - start
    print(1000 * spent / count, before, peak_megabytes())


def _words(count: int) -> Tokenizer:
    """A tokenizer of whole words, w0 w1 w2 ..."""
    tokenizer = Tokenizer(models.WordLevel({f"w{word}": word for word in range(count)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def main(
    repeats: Annotated[int, cyclopts.Parameter(help="Interleaved repeats.")] = 5,
    profile: Annotated[bool, cyclopts.Parameter(help="Print where the step's time goes.")] = False,
    prompts: Annotated[int, cyclopts.Parameter(show=False)] = 0,
    model: Annotated[str, cyclopts.Parameter(show=False)] = "",
    batch_size: Annotated[int, cyclopts.Parameter(show=False)] = 0,
) -> None:
    """Print the ratios."""
    if prompts:
        cost_per_prompt(model, prompts, batch_size)
        return
    logging.set_verbosity_error()
    console = Console(width=140)
    title = f"192 knockouts of a {LENGTH}-token prompt, {torch.get_num_threads()} threads"
    table = Table(
        "model", "step s", "hooked forward s", "plain forward s", "x faster than 192", "x of plain", title=title
    )
    for name in MODELS:
        table.add_row(*ratios(name, repeats, profile, console))
    console.print(table)
    columns = ("model", "batch size", "prompts", "ms per prompt", "peak before, MB", "peak, MB")
    table = Table(*columns, title="16 knockouts of each prompt")
    for name, batch, count in itertools.product(MODELS, BATCHES, PROMPTS):
        options = ["--model", name, "--batch-size", str(batch), "--prompts", str(count)]
        command = [sys.executable, "-m", "benchmarks.flow", *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        table.add_row(name, str(batch), str(count), *(f"{float(value):.0f}" for value in done))
    console.print(table)


if __name__ == "__main__":
    cyclopts.run(main)
