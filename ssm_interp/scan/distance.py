"""How far a head looks back: sums over the matrix that never hold it."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from ssm_interp.scan.blocks import checked_block, slabs
from ssm_interp.scan.terms import Terms, in_full_precision


@in_full_precision
def distance_sums(terms: Terms, *, block: int = 32) -> tuple[Float[Tensor, "b h"], Float[Tensor, "b h"]]:
    """`sum |M[t,s]| (t - s)` and `sum |M[t,s]|` over all edges of each head; their ratio is its mean distance.

    Args:
        terms: the operands; x is not looked at.
        block: positions per block, a power of two.

    Returns:
        Both sums `[b, h]`, in fp32 at least.

    Raises:
        TermsError: a block size that is not a power of two.

    Cost: time as `attention`; O(L (block + N)) memory per head of a slab, never L^2.
    Source: Ben-Kish et al., DeciMamba (arXiv 2406.14528), section 3.2, the Mamba mean distance.

    Example:
        >>> weighted, total = distance_sums(terms)
        >>> weighted / total                             # the effective receptive field of each head, in tokens
    """
    parts: list[Tensor] = []
    positions = torch.arange(terms.length, device=terms.x.device, dtype=terms.x.dtype)
    for heads, rows in slabs(terms, checked_block(block)):
        sums = terms.x.new_zeros(2, terms.batch, heads.stop - heads.start)
        for row in rows:
            size, stop = row.shape[2:]
            targets = rearrange(positions[stop - size : stop], "q -> q 1")
            distance = targets - positions[:stop]  # q s; M is zero where it is negative
            strength = row.abs()
            weighted = einsum(strength, distance, "b h q s, q s -> b h")
            sums = sums + torch.stack([weighted, strength.sum((2, 3))])
        parts.append(sums)
    weighted, total = torch.cat(parts, dim=2)
    return weighted, total
