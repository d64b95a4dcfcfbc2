"""The matrix M of `y = M x`: all of it, chosen rows, or a reduction over heads. All in fp32 at least.

M is put together from blocks of positions. A block keeps three things: its reads, each decayed from the start of the
block to its own position; its writes, each decayed to the end of the block; and its total decay. One product of the
reads of a later block with the writes of an earlier one gives the square between them, and two neighbours make one
block of twice the length. Every factor is exp of a single `dt A` <= 0, or a product of such: nothing overflows, and no
difference of sums loses digits. For Mamba-2 the blocks carry the scalar decays alone and `C B^T`, computed once per
group, multiplies them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from operator import index
from typing import Literal, NamedTuple, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ssm_interp.scan.terms import Terms, TermsError, in_full_precision

SLAB_BYTES = 2**24  # temporary memory of one slab of heads, about

Reduction = Literal["mean", "mean_abs", "norm"]


@in_full_precision
def attention(terms: Terms, *, block: int = 32) -> Float[Tensor, "b h t s"]:
    """The whole matrix `M[t,s] = C_t prod_{r=s+1..t} exp(dt_r A) dt_s B_s`, zero for s > t; dt is folded in.

    Args:
        terms: the operands; x is not looked at.
        block: positions per block, a power of two.

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
    slabs = _slabs(terms, _checked(block))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (terms.dt, terms.A, terms.B, terms.C)):
        return torch.cat([_square(list(rows)) for _, rows in slabs], dim=1)
    length = terms.length
    matrix = terms.x.new_zeros(terms.batch, terms.heads, length, length)
    for heads, rows in slabs:
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
    sums: list[Tensor] = []
    for _, rows in _slabs(terms, _checked(block)):
        parts = [measures[reduction](row).sum(1, keepdim=True) for row in rows]  # b 1 q s
        sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else parts
    total = _square(sums)[:, 0]
    if reduction != "norm":
        return total / terms.heads
    return torch.where(total > 0, torch.where(total > 0, total, 1).sqrt(), 0)  # a gradient of 0, not NaN, at 0


@in_full_precision
def attention_rows(terms: Terms, positions: Sequence[SupportsIndex]) -> Float[Tensor, "b h r s"]:
    """Chosen rows of the matrix, `attention(terms)[:, :, positions]`: what these targets read, from every source.

    Args:
        terms: the operands; x is not looked at.
        positions: target positions in any order; negative ones count from the end.

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


def _rows(
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


def _slabs(terms: Terms, block: int) -> Iterator[tuple[slice, Iterator[Float[Tensor, "b h q s"]]]]:
    """The heads in slabs that share a group, and the block rows of each slab."""
    length, n = terms.length, terms.A.shape[1]
    one_head = terms.x.element_size() * terms.batch * length * (4 * block + 8 * n)
    size = max(1, SLAB_BYTES // one_head)
    per_group = terms.heads // terms.groups
    for group in range(terms.groups):
        C, B = terms.C[:, None, :, group], terms.B[:, None, :, group]  # b 1 t n
        scores = C @ B.mT if terms.scalar_decay else None  # b 1 t s
        for start in range(group * per_group, (group + 1) * per_group, size):
            heads = slice(start, min(start + size, (group + 1) * per_group))
            dt = terms.dt[:, :, heads].transpose(1, 2)[..., None]  # b h t 1
            log_decay = dt * terms.A[heads, None]  # b h t n
            if scores is None:
                yield heads, _rows(log_decay, C, dt * B, block)
            else:
                yield heads, _scored(_rows(log_decay, torch.ones_like(dt[:, :1]), dt, block), scores)


def _scored(
    rows: Iterator[Float[Tensor, "b h q s"]], scores: Float[Tensor, "b 1 t l"]
) -> Iterator[Float[Tensor, "b h q s"]]:
    for row in rows:
        size, stop = row.shape[2:]
        yield row * scores[:, :, stop - size : stop, :stop]


def _square(rows: list[Float[Tensor, "b h _ _"]]) -> Float[Tensor, "b h t t"]:
    """Block rows, each up to its diagonal, as one square matrix."""
    length = rows[-1].shape[-1]
    return torch.cat([pad(row, (0, length - row.shape[-1])) for row in rows], dim=2)


def _checked(block: int) -> int:
    if block < 1 or block & (block - 1):
        raise TermsError(f"block must be a power of two (1, 2, 4, ...), got {block}")
    return block


def _position(terms: Terms, position: SupportsIndex) -> int:
    length = terms.length
    try:
        at = -length - 1 if isinstance(position, bool) else index(position)
    except TypeError:
        at = -length - 1
    if not -length <= at < length:
        raise TermsError(f"a position must be an integer in [{-length}, {length}) for t = {length}, got {position!r}")
    return at % length
