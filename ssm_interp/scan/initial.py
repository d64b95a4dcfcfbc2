"""States at the border of two runs of positions: what is read of one after it, and what positions leave in it.

Each of these runs in every layer of every step, in tens of microseconds: shapes are changed by plain methods, since
patterns of named axes would add a tenth to that.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ssm_interp.errors import TermsError
from ssm_interp.scan.terms import Terms, in_full_precision

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
    undecayed = C @ state.reshape(m, g, -1, terms.state_size).mT  # m g (b/m t) (h/g p)
    undecayed = undecayed.reshape(m, g, b // m, t, h // g, p).permute(2, 0, 3, 1, 4, 5).reshape(b, t, h, p)
    return undecayed * terms.log_decay.cumsum(1).exp()


def _own_decays(terms: Terms, state: Float[Tensor, "m h p n"]) -> Float[Tensor, "b t h p"]:
    m, (b, t, h, p), n = state.shape[0], terms.x.shape, terms.state_size
    steps = terms.dt.cumsum(1)  # b t h
    group = terms.C.reshape(b // m, m, t, terms.groups, 1, n)
    steps = steps.reshape(b // m, m, t, terms.groups, -1, 1)  # b/m m t g h/g 1
    A, state = terms.A.reshape(terms.groups, -1, n), state.reshape(m, 1, terms.groups, -1, p, n)
    y = terms.x.new_empty(b // m, m, t, terms.groups, h // terms.groups, p)
    each = max(1, SLAB // (m * t * h * n))
    tracked = any(part.requires_grad for part in (terms.dt, terms.A, terms.C, state))
    room = None if tracked else terms.x.new_empty(min(each, b // m), *steps.shape[1:-1], n)  # fresh memory is slow
    for first in range(0, b // m, each):
        rows = slice(first, first + each)
        decay = torch.mul(steps[rows], A, out=None if room is None else room[: b // m - first]).exp_()
        C = group[rows].transpose(-1, -2)  # rows m t g n 1
        for column in range(p):
            into = decay if room is not None and column == p - 1 else None
            y[rows, ..., column] = (torch.mul(decay, state[..., column, :], out=into) @ C)[..., 0]
    return y.reshape(b, t, h, p)


@in_full_precision
def leave(terms: Terms, weights: Float[Tensor, "k b t"]) -> Float[Tensor, "k b h p n"]:
    """The states that weighted positions leave behind, `sum_s w_s prod_{r>s} exp(dt_r A) dt_s B_s x_s`.

    Args:
        terms: the operands.
        weights: k sets of weights, for example masks of positions as numbers.

    Returns:
        `[k, b, h, p, n]`, in fp32 at least; with all weights 1 the final state of `scan(terms)`.

    Raises:
        TermsError: weights of another shape.

    Cost: O(L H N) factors, in blocks of positions of constant memory, and O(k L H P N) in matrix products.
    Source: linearity of the recurrence in x.

    Example:
        >>> masks = torch.eye(terms.length)[:, None].expand(-1, terms.batch, -1)
        >>> leave(terms, masks)[3]                                  # what position 3 wrote, decayed to the end
    """
    if weights.shape[1:] != terms.x.shape[:2]:
        raise TermsError(f"the weights must be [k b t] = {['k', *terms.x.shape[:2]]}, got {list(weights.shape)}")
    later = pad(terms.dt[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)  # b t h: the steps after a position
    each = max(1, SLAB // (terms.batch * terms.heads * terms.A.shape[1]))
    states = terms.x.new_zeros(len(weights), *terms.x[:, 0].shape, terms.state_size)
    for first in range(0, terms.length, each):
        span = slice(first, first + each)
        states = states + _left(terms.at(span), later[:, span], weights[..., span].to(terms.x))
    return states


def _left(terms: Terms, later: Float[Tensor, "b t h"], weights: Float[Tensor, "k b t"]) -> Float[Tensor, "k b h p n"]:
    b, t, h, p = terms.x.shape
    g, n, k = terms.groups, terms.state_size, len(weights)
    u = (terms.dt[..., None] * terms.x).reshape(b, t, g, -1, p)  # b t g h/g p
    decay = torch.exp(later[..., None] * terms.A)  # b t h #n
    if terms.scalar_decay:
        u = (u * decay.reshape(b, t, g, -1, 1)).permute(0, 2, 3, 4, 1)  # b g h/g p t
        weighted = terms.B.transpose(1, 2) * weights[..., None, :, None]  # k b g t n
        return (u.reshape(b, g, -1, t) @ weighted).reshape(k, b, h, p, n)
    B = terms.B[:, :, :, None, None] * decay.reshape(b, t, g, -1, 1, n)  # b t g h/g 1 n
    written = (u[..., None] * B).reshape(b, t, -1)
    return (weights.transpose(0, 1) @ written).transpose(0, 1).reshape(k, b, h, p, n)


@in_full_precision
def one_step(terms: Terms) -> Float[Tensor, "b t h p"]:
    """y of single positions from a zero state, `(C_t B_t) dt_t x_t`: the diagonal of M.

    Example:
        >>> one_step(terms.at(slice(0, 1)))               # is scan(terms.at(slice(0, 1)))[0]
    """
    each = terms.heads // terms.groups
    diagonal = (terms.C * terms.B).sum(-1).repeat_interleave(each, dim=2) * terms.dt  # b t h
    return diagonal[..., None] * terms.x
