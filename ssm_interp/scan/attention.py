"""The matrix M of `y = M x`: all of it, chosen rows, or a reduction over heads. All in fp32 at least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from operator import index
from typing import Literal, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ssm_interp.errors import TermsError
from ssm_interp.scan.blocks import checked_block, slabs, square
from ssm_interp.scan.edges import edge_products
from ssm_interp.scan.terms import Terms, in_full_precision

Reduction = Literal["mean", "mean_abs", "norm"]


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
    by_slab = slabs(terms, checked_block(block), fold_dt)
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
def reduced_attention(terms: Terms, reduction: Reduction, *, block: int = 32) -> Float[Tensor, "b t s"]:
    """One number per edge: `attention(terms)` reduced over its heads, without ever holding the matrix of every head.

    Args:
        terms: the operands; x is not looked at.
        reduction: "mean", "mean_abs" (mean of absolute values) or "norm" (root of the sum of squares; in fp32 the
            square of a number below 1e-22 is zero).
        block: positions per block, a power of two.

    Returns:
        `[b, t, s]` in fp32 at least.

    Raises:
        TermsError: an unknown reduction; a block size that is not a power of two.

    Cost: time as `attention`; O(L^2) memory (with autograd O(L^2 H)).

    Example:
        >>> reduced_attention(terms, "mean")             # is attention(terms).mean(1)
    """
    measures = {"mean": torch.positive, "mean_abs": torch.abs, "norm": torch.square}
    if reduction not in measures:
        raise TermsError(f"reduction must be one of {list(measures)}, got {reduction!r}")
    if reduction == "mean" and not terms.scalar_decay:
        ones = terms.x.new_ones(*terms.dt.shape, 1)
        return edge_products(terms.with_x(ones), ones, block=block) / terms.heads
    sums: list[Tensor] = []
    for _, rows in slabs(terms, checked_block(block)):
        parts = [measures[reduction](row).sum(1, keepdim=True) for row in rows]  # b 1 q s
        sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else parts
    total = square(sums)[:, 0]
    if reduction != "norm":
        return total / terms.heads
    return torch.where(total > 0, torch.where(total > 0, total, 1).sqrt(), 0)  # a gradient of 0, not NaN, at 0


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
        rows = rows * terms.dt[:, : targets[0] + 1].transpose(1, 2)[:, :, None]
    order = [targets.index(target) for target in wanted]
    return pad(rows, (0, terms.length - rows.shape[-1]))[:, :, order]


def _columns(terms: Terms, targets: list[int]) -> Iterator[Float[Tensor, "b h r"]]:
    """`M[targets, s] / dt_s` for s from the last target down to 0; the targets are descending."""
    b, h, r, by_group = terms.batch, terms.heads, len(targets), (terms.groups, terms.heads // terms.groups)
    C = terms.C[:, targets, :, None].expand(b, r, *by_group, terms.state_size)  # b r g h/g n
    g = C[:, :0]  # the rows of the targets passed so far, each decayed from its target to s
    for s in range(targets[0], -1, -1):
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
