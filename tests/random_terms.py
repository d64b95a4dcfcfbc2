"""Random terms whose memory is neither trivial nor dead, and the measure all scan tests use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
import torch
from torch import Tensor

from ssm_interp.scan import Terms

LENGTHS = (1, 2, 5, 63, 257)
SHAPES = {  # heads, groups, head_dim, one decay per head
    "mamba1": (5, 1, 1, False),
    "mamba1-grouped": (6, 2, 1, False),
    "mamba2": (4, 1, 3, True),
    "mamba2-g2": (6, 2, 2, True),
    "mamba2-g4": (4, 4, 3, True),
}


def random_terms(
    shape: str,
    length: int,
    *,
    batch: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    largest_dt: float = 20.0,
) -> Terms:
    """dt is log-uniform in [0.001, largest_dt] and |A| in [0.05, 4]: some edges span the text, some die in a step.

    All values are representable in fp32, so that a host that casts to fp32 in between loses nothing by it.
    """
    heads, groups, head_dim, scalar_decay = SHAPES[shape]
    state_size = 3
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def log_uniform(low: float, high: float, *shape: int) -> Tensor:
        return low * (high / low) ** torch.rand(*shape, generator=random)

    return Terms(
        x=normal(batch, length, heads, head_dim),
        dt=log_uniform(0.001, largest_dt, batch, length, heads),
        A=-log_uniform(0.05, 4.0, heads, 1 if scalar_decay else state_size),
        B=normal(batch, length, groups, state_size),
        C=normal(batch, length, groups, state_size),
    ).to(dtype)


def with_grad(terms: Terms) -> Terms:
    """The same numbers as leaves that want a gradient."""
    return Terms(*(part.detach().clone().requires_grad_() for part in parts(terms)))


def parts(terms: Terms) -> tuple[Tensor, ...]:
    return terms.x, terms.dt, terms.A, terms.B, terms.C


@contextmanager
def as_users_run_it() -> Iterator[None]:
    """Without the annotation checks of the tests: what they would refuse has to get an error of our own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest deviation, relative to the largest number expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.isfinite().all() and expected.isfinite().all()
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().double().clamp_min(1e-30)
    return float((actual.double() - expected.double()).abs().max() / scale)
