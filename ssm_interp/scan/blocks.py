"""A causal matrix of decayed products, put together from blocks of positions.

A block keeps three things: its reads, each decayed from the start of the block to its own position; its writes, each
decayed to the end of the block; and its total decay. One product of the reads of a later block with the writes of an
earlier one gives the square between them, and two neighbours make one block of twice the length. Every factor is exp of
a single `dt A` <= 0, or a product of such: nothing overflows, and no difference of sums loses digits. For Mamba-2 the
blocks carry the scalar decays alone and `C B^T`, computed once per group, multiplies them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ssm_interp.errors import TermsError
from ssm_interp.scan.terms import Terms

SLAB_BYTES = 2**24  # temporary memory of one slab of heads, about


class _Blocks(NamedTuple):
    """k neighbouring blocks of q positions."""

    reads: Float[Tensor, "b h k q n"]  # C_t, decayed from the start of its block to t
    writes: Float[Tensor, "b h k q n"]  # dt_s B_s, decayed from s to the end of its block
    decay: Float[Tensor, "b h k 1 n"]  # of the whole block
    matrix: Float[Tensor, "b h k q q"]  # M within the block

    def paired(self) -> _Blocks:
        """The same positions in half as many blocks, each of two neighbours."""
        reads, later_reads = self.reads[:, :, 0::2], self.reads[:, :, 1::2]
        writes, later_writes = self.writes[:, :, 0::2], self.writes[:, :, 1::2]
        decay, later_decay = self.decay[:, :, 0::2], self.decay[:, :, 1::2]
        matrix, later_matrix = self.matrix[:, :, 0::2], self.matrix[:, :, 1::2]
        between = later_reads @ writes.mT
        return _Blocks(
            torch.cat([reads, later_reads * decay], dim=-2),
            torch.cat([writes * later_decay, later_writes], dim=-2),
            decay * later_decay,
            torch.cat([pad(matrix, (0, matrix.shape[-1])), torch.cat([between, later_matrix], dim=-1)], dim=-2),
        )


def block_rows(
    log_decay: Float[Tensor, "b h t n"],
    reads: Float[Tensor, "b #h t n"],  # noqa: UP037 - jaxtyping, no comment
    writes: Float[Tensor, "b h t n"],
    block: int,
) -> Iterator[Float[Tensor, "b h q s"]]:
    """`M[t,s] = sum_n reads_t[n] exp(sum_{r=s+1..t} log_decay_r[n]) writes_s[n]`: block rows, up to their diagonal."""
    length = log_decay.shape[2]
    block = min(block, 1 << (length - 1).bit_length())
    padding = (0, 0, 0, 0, 0, -length % block)
    log_decay, reads, writes = (pad(part[..., None, :], padding) for part in (log_decay, reads, writes))
    decay = log_decay.exp()  # b h k 1 n: at first each position is a block
    blocks = _Blocks(reads * decay, writes, decay, (reads * writes).sum(-1, keepdim=True))
    while blocks.matrix.shape[-1] < block:
        blocks = blocks.paired()
    earlier = writes[:, :, 0, :0]  # b h s n: the writes of all earlier blocks, decayed to the start of this one
    for reads, writes, decay, matrix in zip(*(part.unbind(2) for part in blocks), strict=True):
        stop = min(earlier.shape[2] + block, length)
        row = torch.cat([reads @ earlier.mT, matrix], dim=-1)
        yield row[:, :, : stop - earlier.shape[2], :stop]
        earlier = torch.cat([earlier * decay, writes], dim=2)


def square(rows: list[Float[Tensor, "b h _ _"]]) -> Float[Tensor, "b h t t"]:
    """Block rows, each up to its diagonal, as one square matrix."""
    length = rows[-1].shape[-1]
    return torch.cat([pad(row, (0, length - row.shape[-1])) for row in rows], dim=2)


def slabs(
    terms: Terms, block: int, steps: Float[Tensor, "b t h"] | None = None
) -> Iterator[tuple[slice, Iterator[Float[Tensor, "b h q s"]]]]:
    """The heads in slabs that share a group, and the block rows of each slab; a source writes steps B (None: dt B)."""
    steps = terms.dt if steps is None else steps
    length, n = terms.length, terms.A.shape[1]
    one_head = terms.x.element_size() * terms.batch * length * (4 * block + 8 * n)
    size = max(1, SLAB_BYTES // one_head)
    per_group = terms.heads // terms.groups
    for group in range(terms.groups):
        C, B = (rearrange(part[:, :, group], "b t n -> b 1 t n") for part in (terms.C, terms.B))
        scores = C @ B.mT if terms.scalar_decay else None  # b 1 t s
        for start in range(group * per_group, (group + 1) * per_group, size):
            heads = slice(start, min(start + size, (group + 1) * per_group))
            # b h t 1, the last axis by indexing: a pattern would give it a stride that makes products copy
            dt, scale = (rearrange(part[:, :, heads], "b t h -> b h t")[..., None] for part in (terms.dt, steps))
            log_decay = dt * terms.A[heads, None]  # b h t n
            if scores is None:
                yield heads, block_rows(log_decay, C, scale * B, block)
            else:
                yield heads, _scored(block_rows(log_decay, torch.ones_like(dt[:, :1]), scale, block), scores)


def _scored(
    rows: Iterator[Float[Tensor, "b h q s"]], scores: Float[Tensor, "b 1 t l"]
) -> Iterator[Float[Tensor, "b h q s"]]:
    for row in rows:
        size, stop = row.shape[2:]
        yield row * scores[:, :, stop - size : stop, :stop]


def checked_block(block: int) -> int:
    """The block size itself.

    Raises:
        TermsError: it is no power of two.
    """
    if block < 1 or block & (block - 1):
        raise TermsError(f"block must be a power of two (1, 2, 4, ...), got {block}")
    return block
