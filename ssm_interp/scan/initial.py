"""What an initial state alone gives to the positions after it, without running the recurrence."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ssm_interp.scan.terms import Terms, TermsError, in_full_precision

SLAB = 2**18  # decay factors held at once: about what a core keeps in its own cache


@in_full_precision
def read_initial(terms: Terms, state: Float[Tensor, "m h p n"]) -> Float[Tensor, "b t h p"]:
    """`C_t prod_{r<=t} exp(dt_r A) state`: what is read of an initial state, apart from all that is written after it.

    Adding `scan(terms)[0]` gives the y of the recurrence that starts from the state. Nothing is kept per row, so many
    rows may share one state.

    Args:
        terms: the operands of b rows; x is not looked at.
        state: m states with m a divisor of b; row r starts from state r mod m.

    Returns:
        `[b, t, h, p]`, in fp32 at least.

    Raises:
        TermsError: states of another shape, or a number of them that does not divide the rows.

    Cost: with one decay per head (Mamba-2) a matrix product for each head and distinct state, O(L H P N) in all; else
        one pass over `b t h n` factors, in slabs of constant memory.
    Source: linearity of the recurrence in its initial state.

    Example:
        >>> y = read_initial(terms, state) + scan(terms)[0]         # is scan(terms, state)[0]
    """
    expected = (terms.heads, terms.head_dim, terms.state_size)
    if state.ndim != 4 or state.shape[1:] != expected or terms.batch % state.shape[0]:
        raise TermsError(
            f"the initial states must be [m h p n] = {['m', *expected]} with m a divisor of the {terms.batch} rows, "
            f"got {list(state.shape)}"
        )
    return (_one_decay if terms.scalar_decay else _own_decays)(terms, state.to(terms.x))


def _one_decay(terms: Terms, state: Float[Tensor, "m h p n"]) -> Float[Tensor, "b t h p"]:
    m, g, (b, t, h, p) = state.shape[0], terms.groups, terms.x.shape
    C = terms.C.reshape(b // m, m, t, g, -1).permute(1, 3, 0, 2, 4).flatten(2, 3)  # m g (b/m t) n
    found = C @ state.reshape(m, g, -1, terms.state_size).mT  # m g (b/m t) (h/g p)
    read = found.reshape(m, g, b // m, t, h // g, p).permute(2, 0, 3, 1, 4, 5).reshape(b, t, h, p)
    return read * terms.log_decay[..., 0].cumsum(1).exp()[..., None]


def _own_decays(terms: Terms, state: Float[Tensor, "m h p n"]) -> Float[Tensor, "b t h p"]:
    m, (b, t, h, p), n = state.shape[0], terms.x.shape, terms.state_size
    steps = terms.dt.cumsum(1)  # b t h
    group = terms.C.reshape(b // m, m, t, terms.groups, 1, n)
    steps = steps.reshape(b // m, m, t, terms.groups, -1, 1)  # b/m m t g h/g 1
    A, state = terms.A.reshape(terms.groups, -1, n), state.reshape(m, 1, terms.groups, -1, p, n)
    y = terms.x.new_empty(b // m, m, t, terms.groups, h // terms.groups, p)
    each = max(1, SLAB // (m * t * h * n))
    for first in range(0, b // m, each):
        rows = slice(first, first + each)
        decay = (steps[rows] * A).exp_()  # rows m t g h/g n
        C = group[rows].transpose(-1, -2)  # rows m t g n 1
        for column in range(p):
            y[rows, ..., column] = ((decay * state[..., column, :]) @ C)[..., 0]
    return y.reshape(b, t, h, p)


@in_full_precision
def one_step(terms: Terms) -> Float[Tensor, "b t h p"]:
    """y of single positions from a zero state, `(C_t B_t) dt_t x_t`: the diagonal of M.

    Example:
        >>> one_step(terms.at(slice(0, 1)))               # is scan(terms.at(slice(0, 1)))[0]
    """
    each = terms.heads // terms.groups
    diagonal = (terms.C * terms.B).sum(-1).repeat_interleave(each, dim=2) * terms.dt  # b t h
    return diagonal[..., None] * terms.x
