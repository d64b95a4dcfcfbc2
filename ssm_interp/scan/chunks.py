"""The recurrence of one decay per head (Mamba-2) by chunks: matrix products in place of single steps."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ssm_interp.scan.attention import attention
from ssm_interp.scan.terms import Terms

CHUNK = 64


def scan_by_chunks(
    terms: Terms, state: Float[Tensor, "b h p n"]
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """y and the final state, as the recurrence gives them.

    Within a chunk y is `M x`; what the state before it gives is read through the decay since then. Decays are sums
    taken from one end of the chunk, never differences of sums, so no digits cancel and every exponent is <= 0.

    Cost: O(L CHUNK H P + L H P N) time in matrix products; O(CHUNK^2 H + H P N) memory beside the result.
    Source: Mamba-2 (arXiv 2405.21060), section 6.
    """
    found = []
    for start in range(0, terms.length, CHUNK):
        part = terms.at(slice(start, start + CHUNK))
        y, state = _chunk(part, state)
        found.append(y)
    return torch.cat(found, dim=1), state


def _chunk(terms: Terms, state: Float[Tensor, "b h p n"]) -> tuple[Float[Tensor, "b q h p"], Float[Tensor, "b h p n"]]:
    b, q, h, p = terms.x.shape
    g, n = terms.groups, terms.state_size
    log_decay = terms.log_decay[..., 0]  # b q h
    since_start = log_decay.cumsum(1).exp()
    to_end = pad(log_decay[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1).exp()  # the decay after a position
    inside = (attention(terms) @ terms.x.transpose(1, 2)).transpose(1, 2)  # b q h p
    before = torch.einsum("bqgn,bgkpn->bqgkp", terms.C, state.reshape(b, g, -1, p, n)).reshape(b, q, h, p)
    y = inside + since_start[..., None] * before
    u = ((to_end * terms.dt)[..., None] * terms.x).reshape(b, q, g, -1, p)
    written = torch.einsum("bqgkp,bqgn->bgkpn", u, terms.B).reshape(state.shape)
    return y, since_start[:, -1, :, None, None] * state + written
