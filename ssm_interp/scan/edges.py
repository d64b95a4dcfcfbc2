"""One number for every edge: what it carries, weighed at its target, summed over heads without a matrix per head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from ssm_interp.errors import TermsError
from ssm_interp.scan.blocks import block_rows, checked_block, square
from ssm_interp.scan.terms import Terms, in_full_precision

SLAB_BYTES = 2**21  # of the operands of one slab of heads: about what a core keeps in its own cache

FeatureMask: TypeAlias = Bool[Tensor, "h #n"]  # noqa: UP037 - jaxtyping, no comment
"""Features to sum over: heads `[h, 1]` or (head, state) pairs `[h, n]`."""


@in_full_precision
def edge_products(
    terms: Terms,
    weights: Float[Tensor, "b t h p"],
    groups: Sequence[FeatureMask] | None = None,
    *,
    block: int = 64,
) -> Float[Tensor, "b *k t s"]:
    """`sum_{h,p} weights[t,h,p] M[h,t,s] x[s,h,p]` for every edge at once, zero for s > t.

    With the gradient of a number with respect to y as weights, it is how that number changes with each edge, to first
    order. With ones in the place of weights and x (`p = 1`) it is M summed over its heads.

    Args:
        terms: the operands.
        weights: one for each entry of y, `[b, t, h, p]`.
        groups: features to sum over, each a bool tensor of heads `[h, 1]` or of pairs (head, state) `[h, n]`; None is
            one group of all, and leaves its dimension out.
        block: positions per block, a power of two.

    Returns:
        `[b, t, s]`, or with groups `[b, k, t, s]`, in fp32 at least. Groups may overlap.

    Raises:
        TermsError: weights of another shape than x, a group of another shape or not bool; a block size that is not a
            power of two.

    Cost: for each group, in proportion to its heads: with a decay per state (Mamba-1) O(L^2 H P N) multiplications in
        matrix products over (head, state), and O(L H P N) exponentials; with a decay per head (Mamba-2)
        O(L^2 (H P + G N)). Memory O(L^2) beside a slab of heads.
    Source: the identity `d f / d m[t,s] = sum_{h,p} (d f / d y[t,h,p]) M[h,t,s] x[s,h,p]` for y = (m * M) x.

    Example:
        >>> edge_products(terms, gy)                     # is einsum("bthp,bhts,bshp->bts", gy, attention(terms), x)
    """
    if weights.shape != terms.x.shape:
        raise TermsError(
            f"weights must be [b t h p] = {list(terms.x.shape)}, as x and y are; got {list(weights.shape)}"
        )
    weights, block = weights.to(terms.x), checked_block(block)
    if groups is None:
        return _products(terms, weights, terms.A.new_ones(terms.heads, 1, dtype=torch.bool), block)
    masks = [_checked_group(terms, group) for group in groups]
    if not masks:
        raise TermsError("edge_products got no groups; None is one group of all features")
    return torch.stack([_products(terms, weights, mask, block) for mask in masks], dim=1)


def _products(terms: Terms, weights: Float[Tensor, "b t h p"], mask: FeatureMask, block: int) -> Float[Tensor, "b t s"]:
    """The sum over the features of a mask, a slab of heads that share a group of B and C at a time."""
    b, t, h, p = terms.x.shape
    total = terms.x.new_zeros(b, t, t)
    wide = t if terms.scalar_decay else p * terms.state_size  # numbers per position and head, about
    size = max(1, SLAB_BYTES // (terms.x.element_size() * b * t * wide))
    for group, members in enumerate(torch.arange(h, device=mask.device).chunk(terms.groups)):
        chosen = members[mask[members].any(-1)]
        for heads in torch.split(chosen, size) if len(chosen) else ():
            part = Terms(
                terms.x[:, :, heads],
                terms.dt[:, :, heads],
                terms.A[heads],
                terms.B[:, :, [group]],
                terms.C[:, :, [group]],
            )
            sum_heads = _with_head_decay if terms.scalar_decay else _with_state_decay
            total = total + sum_heads(part, weights[:, :, heads], mask[heads], block)
    return total


def _with_state_decay(
    terms: Terms, weights: Float[Tensor, "b t h p"], mask: FeatureMask, block: int
) -> Float[Tensor, "b t s"]:
    """(head, value, state) is one long axis of the reads, which carry the weights, and of the writes, which carry x."""
    u = einsum(terms.dt, terms.x, "b t h, b t h p -> b t h p")
    reads = einsum(weights, torch.where(mask, terms.C, 0), "b t h p, b t h n -> b t h p n")
    writes = einsum(u, terms.B[:, :, 0], "b t h p, b t n -> b t h p n")
    log_decay = repeat(terms.log_decay, "b t h n -> b t h p n", p=terms.head_dim)
    log_decay, reads, writes = (rearrange(part, "b t h p n -> b 1 t (h p n)") for part in (log_decay, reads, writes))
    return square(list(block_rows(log_decay, reads, writes, block)))[:, 0]


def _with_head_decay(
    terms: Terms, weights: Float[Tensor, "b t h p"], mask: FeatureMask, block: int
) -> Float[Tensor, "b t s"]:
    """Decays, weighed values and C B^T are three matrices, the last one shared by whole heads."""
    dt, A = rearrange(terms.dt, "b t h -> b h t")[..., None], rearrange(terms.A, "h 1 -> h 1 1")
    decays = square(list(block_rows(dt * A, torch.ones_like(dt[:, :1]), dt, block)))  # b h t s
    values = decays * einsum(weights, terms.x, "b t h p, b s h p -> b h t s")
    C, B = terms.C[:, :, 0], terms.B[:, :, 0]  # b t n
    if mask.all():
        return values.sum(1) * einsum(C, B, "b t n, b s n -> b t s")
    chosen = torch.where(rearrange(mask, "h n -> h 1 n"), rearrange(C, "b t n -> b 1 t n"), 0)
    return (values * (chosen @ rearrange(B, "b s n -> b 1 n s"))).sum(1)


def _checked_group(terms: Terms, group: Tensor) -> FeatureMask:
    if not isinstance(group, Tensor) or group.dtype != torch.bool:
        got = group.dtype if isinstance(group, Tensor) else type(group).__name__
        raise TermsError(f"a group of features must be a bool tensor, True where a feature belongs to it; got {got}")
    if group.shape not in ((terms.heads, 1), (terms.heads, terms.state_size)):
        raise TermsError(
            f"a group of features must be heads [h, 1] = [{terms.heads}, 1] or pairs [h, n] = "
            f"[{terms.heads}, {terms.state_size}], got {list(group.shape)}"
        )
    return group.to(terms.x.device)
