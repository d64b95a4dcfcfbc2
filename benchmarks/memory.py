"""One operation on the terms of one Mamba-1 layer of the 130M shape: seconds, growth of the process's peak, and size of
the result in MB. Run in a process of its own: `python -m benchmarks.memory CASE`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ssm_interp.scan import Terms, attention, attention_rows, reduced_attention, scan

HEADS, STATES = 1536, 16

CASES: dict[str, tuple[int, Callable[[Terms], Tensor]]] = {
    "attention, L = 128": (128, attention),
    "attention, reduced over heads, L = 1024": (1024, lambda terms: reduced_attention(terms, "mean_abs")),
    "one row of attention, L = 4096": (4096, lambda terms: attention_rows(terms, [-1])),
    "scan, L = 4096": (4096, lambda terms: scan(terms)[0]),
}


def terms_of(length: int) -> Terms:
    torch.manual_seed(0)
    return Terms(
        x=torch.randn(1, length, HEADS, 1),
        dt=torch.rand(1, length, HEADS) * 0.5,
        A=-torch.arange(1.0, STATES + 1).expand(HEADS, STATES).contiguous(),
        B=torch.randn(1, length, 1, STATES),
        C=torch.randn(1, length, 1, STATES),
    )


def peak_megabytes() -> float:
    """Peak resident memory of this program alone (Linux; getrusage would count the parent's before exec)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory is measured on Linux only")


def main(case: str) -> None:
    length, operation = CASES[case]
    with torch.no_grad():
        operation(terms_of(8))
        terms = terms_of(length)
        before, start = peak_megabytes(), time.perf_counter()
        result = operation(terms)
        seconds = time.perf_counter() - start
    print(seconds, peak_megabytes() - before, result.numel() * result.element_size() / 2**20)


if __name__ == "__main__":
    main(*sys.argv[1:])
