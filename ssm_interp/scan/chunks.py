"""The recurrence of one decay per head (Mamba-2) by chunks: matrix products in place of single steps."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ssm_interp.scan.attention import attention
from ssm_interp.scan.terms import Terms

CHUNK = 64
SLAB_BYTES = 2**25  # of the matrices and states of the chunks that are computed together, about


def scan_by_chunks(
    terms: Terms, state: Float[Tensor, "b h p n"]
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """y and the final state, as the recurrence gives them.

    Within a chunk y is `M x`; what the state before it gives is read through the decay since then. Decays are sums
    taken from one end of the chunk, never differences of sums, so no digits cancel and every exponent is <= 0.

    Cost: O(L CHUNK H P + L H P N) time in matrix products; constant memory beside the result.
    Source: Mamba-2 (arXiv 2405.21060), section 6.
    """
    each = terms.x.element_size() * terms.batch * terms.heads * (CHUNK * CHUNK + terms.head_dim * terms.state_size)
    slab = CHUNK * max(1, SLAB_BYTES // each)
    whole = terms.length - terms.length % CHUNK
    borders = [*range(0, whole, slab), whole, terms.length]
    outputs = []
    for start, stop in zip(borders, borders[1:], strict=False):
        if stop > start:
            y, state = _chunks(terms.at(slice(start, stop)), min(CHUNK, stop - start), state)
            outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), state


def _chunks(
    terms: Terms, q: int, state: Float[Tensor, "b h p n"]
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """k chunks of q positions; they are rows r of a batch, but for the states that pass from one to the next."""
    b, g = terms.batch, terms.groups
    x, dt, B, C = (rearrange(part, "b (k q) ... -> (b k) q ...", q=q) for part in (terms.x, terms.dt, terms.B, terms.C))
    rows = Terms(x, dt, terms.A, B, C)
    log_decay = rows.log_decay[..., 0]  # (b k) q h
    since_start = log_decay.cumsum(1).exp()
    to_end = pad(log_decay[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1).exp()  # the decay after a position
    inside = einsum(attention(rows), x, "r h q s, r s h p -> r q h p")
    u = rearrange((to_end * dt)[..., None] * x, "r q (g j) p -> r q g j p", g=g)
    written = rearrange(einsum(u, B, "r q g j p, r q g n -> r g j p n"), "(b k) g j p n -> k b (g j) p n", b=b)
    decay = rearrange(since_start[:, -1], "(b k) h -> k b h 1 1", b=b)
    before = []
    for kept, added in zip(decay, written, strict=True):
        before.append(state)
        state = torch.addcmul(added, kept, state)
    states = rearrange(torch.stack(before), "k b (g j) p n -> (b k) g j p n", g=g)
    from_before = rearrange(einsum(C, states, "r q g n, r g j p n -> r q g j p"), "r q g j p -> r q (g j) p")
    y = inside + since_start[..., None] * from_before
    return rearrange(y, "(b k) q h p -> b (k q) h p", b=b), state
