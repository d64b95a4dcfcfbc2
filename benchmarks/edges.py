"""Measure the attribution of all edges beside a plain forward and backward, on random models of the 130M shape.

    python -m benchmarks.edges                    # two minutes or so on 2 cores

Plain is the unattached host's own forward and `backward()`, gradients of the parameters included; "own operator" is the
same through `attach(own_operator=True)`, whose recurrence is faster to differentiate on a CPU. Seconds are the best of
the repeats, memory is the growth of the peak of a fresh process over the loaded model.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated

import cyclopts
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import ssm_interp as si
from benchmarks.__main__ import build
from benchmarks.memory import peak_megabytes
from ssm_interp.attribution import edge_attribution
from ssm_interp.features import feature_groups
from ssm_interp.hooks import logit_difference

MODELS = ("mamba1-130m", "mamba2-130m")
CASES = ("plain", "own operator", "all edges", "all edges, 3 groups")


def case(name: str, what: str, length: int) -> Callable[[], object]:
    """What to time on a model."""
    model = build(name)
    ids = torch.randint(0, 50280, (1, length), generator=torch.Generator().manual_seed(0))
    metric = logit_difference(11, 12)

    def backward() -> None:
        metric(model(input_ids=ids, use_cache=False).logits[:, -1]).sum().backward()
        model.zero_grad()

    if what == "plain":
        return backward
    ssm = si.attach(model, own_operator=what == "own operator")
    if what == "own operator":
        return backward
    groups = feature_groups(ssm, ["top third", "middle third", "bottom third"]) if "groups" in what else None
    return lambda: edge_attribution(ssm, ids, metric, features=groups)


def measure(name: str, what: str, length: int, repeats: int) -> None:
    """Print seconds and the growth of the peak in MB, of this process."""
    logging.set_verbosity_error()
    call = case(name, what, length)
    before, seconds = peak_megabytes(), []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    print(min(seconds), peak_megabytes() - before)


def main(
    length: Annotated[int, cyclopts.Parameter(help="Tokens in the prompt.")] = 128,
    repeats: Annotated[int, cyclopts.Parameter(help="Of each; the best counts.")] = 3,
) -> None:
    """Print the ratios."""
    threads = torch.get_num_threads()
    title = f"all edges of 24 layers, {length} tokens, {threads} threads"
    table = Table(
        "model", "what", "s", "/ plain", "/ own operator", "peak MB", "/ plain", "/ own operator", title=title
    )
    for name in MODELS:
        found: dict[str, list[float]] = {}
        for what in CASES:
            arguments = [sys.executable, "-m", "benchmarks.edges", "--one", name, what, str(length), str(repeats)]
            result = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
            found[what] = [float(value) for value in result.split()]
            cells = [
                text
                for at, digits in ((0, 2), (1, 0))
                for text in (
                    f"{found[what][at]:.{digits}f}",
                    f"{found[what][at] / found['plain'][at]:.2f}",
                    f"{found[what][at] / found['own operator'][at]:.2f}" if "own operator" in found else "",
                )
            ]
            table.add_row(name, what, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        cyclopts.run(main)
