"""The matrix M of `y = M x`: all of it, chosen rows, or a reduction over heads. All in fp32 at least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import index
from typing import Literal, SupportsIndex

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ssm_interp.errors import TermsError
from ssm_interp.scan.blocks import checked_block, slabs, square
from ssm_interp.scan.edges import edge_products
from ssm_interp.scan.terms import Terms, in_full_precision

Reduction = Literal["mean", "mean_abs", "norm"]
MEASURES: Mapping[Reduction, Callable[[Tensor], Tensor]] = {
    "mean": torch.positive,
    "mean_abs": torch.abs,
    "norm": torch.square,
}
"""What of each entry a reduction sums up."""


@in_full_precision
def attention(terms: Terms, *, block: int = 32, fold_dt: bool = True) -> Float[Tensor, "b h t s"]:
    """The whole matrix `M[t,s] = C_t prod_{r=s+1..t} exp(dt_r A) dt_s B_s`, zero for s > t; dt is folded in.

    Args:
        terms: the operands; x is not looked at.
        block: positions per block, a power of two.
        fold_dt: without it dt_s is left out (not divided by): the attention-like form, whose values are dt_s x_s.

    Returns:
        `[b, h, t, s]` in fp32 at least (bf16 and fp16 terms are cast up), such that `y = M x`.

    Raises:
        TermsError: a block size that is not a power of two.

    Cost: Mamba-1 O(L^2 H N) time, Mamba-2 O(L^2 (H + G N)); without autograd no memory beside the result but a
        slab of heads.
    Source: Ali et al. (arXiv 2403.01590) eq. 11 for Mamba-1, Dao & Gu (arXiv 2405.21060) section 3 for Mamba-2.

    Example:
        >>> torch.einsum("bhts,bshp->bthp", attention(terms), terms.x)      # is scan(terms)[0]
    """
    by_slab = slabs(terms, checked_block(block), None if fold_dt else torch.ones_like(terms.dt))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (terms.dt, terms.A, terms.B, terms.C)):
        return torch.cat([square(list(rows)) for _, rows in by_slab], dim=1)
    length = terms.length
    matrix = terms.x.new_zeros(terms.batch, terms.heads, length, length)
    for heads, rows in by_slab:
        for row in rows:
            size, stop = row.shape[2:]
            matrix[:, heads, stop - size : stop, :stop] = row
    return matrix


@in_full_precision
def reduced_attention(
    terms: Terms,
    reduction: Reduction,
    *,
    heads: Iterable[int] | None = None,
    steps: Float[Tensor, "b t h"] | None = None,
    block: int = 32,
) -> Float[Tensor, "b t s"]:
    """One number per edge: `attention(terms)` reduced over heads, without ever holding the matrix of every head.

    Args:
        terms: the operands; x is not looked at.
        reduction: "mean", "mean_abs" (mean of absolute values) or "norm" (root of the sum of squares; in fp32 the
            square of a number below 1e-22 is zero).
        heads: those to reduce over; None: all.
        steps: what takes the place of dt_s in M[t,s] (the decays keep dt): ones for the attention-like form; None: dt.
        block: positions per block, a power of two.

    Returns:
        `[b, t, s]` in fp32 at least.

    Raises:
        TermsError: an unknown reduction; no heads, or one that does not exist; steps of another shape than dt; a block
            size that is not a power of two.

    Cost: time as `attention` of these heads; O(L^2) memory (with autograd O(L^2 H)).

    Example:
        >>> reduced_attention(terms, "mean")             # is attention(terms).mean(1)
    """
    if reduction not in MEASURES:
        raise TermsError(f"reduction must be one of {list(MEASURES)}, got {reduction!r}")
    if steps is not None and steps.shape != terms.dt.shape:
        raise TermsError(f"steps must be [b t h] = {list(terms.dt.shape)}, as dt, got {list(steps.shape)}")
    parts = [(list(range(terms.heads)), terms)] if heads is None else list(terms.of_heads(heads))
    count, block = sum(part.heads for _, part in parts), checked_block(block)
    if reduction == "mean" and steps is None and not terms.scalar_decay:
        total = sum((_matrix_sum(part, block) for _, part in parts[1:]), _matrix_sum(parts[0][1], block))
    else:
        by_slab = (
            rows
            for members, part in parts
            for _, rows in slabs(part, block, None if steps is None else steps.to(part.x)[:, :, members])
        )
        total = _sum_over_heads(by_slab, MEASURES[reduction])
    if reduction != "norm":
        return total / count
    return torch.where(total > 0, torch.where(total > 0, total, 1).sqrt(), 0)  # a gradient of 0, not NaN, at 0


def _matrix_sum(terms: Terms, block: int) -> Float[Tensor, "b t s"]:
    ones = terms.x.new_ones(*terms.dt.shape, 1)
    return edge_products(terms.with_x(ones), ones, block=block)


def _sum_over_heads(
    by_slab: Iterable[Iterator[Float[Tensor, "b h q s"]]], measure: Callable[[Tensor], Tensor]
) -> Float[Tensor, "b t s"]:
    sums: list[Tensor] = []  # b 1 q s
    for rows in by_slab:
        of_slab = [measure(row).sum(1, keepdim=True) for row in rows]
        sums = [total + part for total, part in zip(sums, of_slab, strict=True)] if sums else of_slab
    return square(sums)[:, 0]


@in_full_precision
def attention_rows(
    terms: Terms, positions: Sequence[SupportsIndex], *, fold_dt: bool = True
) -> Float[Tensor, "b h r s"]:
    """Chosen rows of the matrix, `attention(terms)[:, :, positions]`: what these targets read, from every source.

    Args:
        terms: the operands; x is not looked at.
        positions: target positions in any order; negative ones count from the end.
        fold_dt: as of `attention`.

    Returns:
        `[b, h, r, s]` in fp32 at least, rows in the order asked for.

    Raises:
        TermsError: a position that is not an integer in [-L, L).

    Cost: O(L H N) time per row; O(H (L + N)) memory per row (with autograd O(L H N)).
    Source: the adjoint recursion, `g_t = C_t`, `g_s = exp(dt_{s+1} A) g_{s+1}`, `M[t,s] = g_s . B_s dt_s`.

    Example:
        >>> attention_rows(terms, [-1])[0, :, 0]         # what the last position reads: [h, s]
    """
    wanted = [_position(terms, position) for position in positions]
    targets = sorted(set(wanted), reverse=True)
    if not targets:
        return terms.x.new_zeros(terms.batch, terms.heads, 0, terms.length)
    columns, chunks = _columns(terms, targets), []
    while chunk := list(islice(columns, 64)):  # put together as they come: small pieces would fragment the memory
        chunks.append(torch.stack(chunk[::-1], dim=-1))
    rows = torch.cat(chunks[::-1], dim=-1)  # b h r s
    if fold_dt:
        rows = rows * rearrange(terms.dt[:, : targets[0] + 1], "b s h -> b h 1 s")
    order = [targets.index(target) for target in wanted]
    return pad(rows, (0, terms.length - rows.shape[-1]))[:, :, order]


def _columns(terms: Terms, targets: list[int]) -> Iterator[Float[Tensor, "b h r"]]:
    """`M[targets, s] / dt_s` for s from the last target down to 0; the targets are descending."""
    b, h, r, by_group = terms.batch, terms.heads, len(targets), (terms.groups, terms.heads // terms.groups)
    C = repeat(terms.C[:, targets], "b r g n -> b r g j n", j=by_group[1])
    g = C[:, :0]  # the rows of the targets passed so far, each decayed from its target to s
    for s in range(targets[0], -1, -1):  # plain shapes: a step takes microseconds
        if s in targets:
            g = torch.cat([g, C[:, g.shape[1], None]], dim=1)
        column = (g @ terms.B[:, s, None, :, :, None]).reshape(b, -1, h).transpose(1, 2)
        yield pad(column, (0, r - g.shape[1]))
        g = g * (terms.dt[:, s, :, None] * terms.A).exp().reshape(b, 1, *by_group, -1)


def _position(terms: Terms, position: SupportsIndex) -> int:
    length = terms.length
    try:
        at = -length - 1 if isinstance(position, bool) else index(position)
    except TypeError:
        at = -length - 1
    if not -length <= at < length:
        raise TermsError(f"a position must be an integer in [{-length}, {length}) for t = {length}, got {position!r}")
    return at % length
