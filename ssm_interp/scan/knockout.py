"""Edges taken out of `y = M x` without ever building M.

The operator is linear in x and causal, so all that some targets read from some sources is one more call of it: on x
with every other source set to zero, looked at only at those targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import TypeAlias

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from ssm_interp.errors import TermsError
from ssm_interp.scan.recurrence import scan
from ssm_interp.scan.terms import Terms, in_full_precision, per_head

FEW = 32  # targets or sources up to which single entries of M cost less than a scan

Edges: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""Which target <- source edges: a bool mask `[t, s]` or `[b, t, s]`, or a pair of bool tensors (targets `[t]` or
`[b, t]`, sources `[s]` or `[b, s]`) that means every target x source, at no L^2 memory. Edges with s > t do not exist
and are passed over."""

Features: TypeAlias = Tensor | None
"""What a knockout is restricted to: heads, a bool tensor `[h]`; (head, state) pairs, bool `[h, n]`; None is all."""

Operator: TypeAlias = Callable[[Terms], Tensor]
"""Terms -> y `[b, t, h, p]`, from a zero state. It has to take B and C of as many groups as heads (for pairs)."""


def scan_values(terms: Terms) -> Float[Tensor, "b t h p"]:
    """y of our own scan from a zero state: the default operator."""
    return scan(terms)[0]


def edge_mask(targets: Bool[Tensor, "*b t"], sources: Bool[Tensor, "*b s"]) -> Bool[Tensor, "*b t s"]:
    """Targets x sources written out as a mask, without the edges that do not exist (s > t).

    Example:
        >>> last, first = torch.tensor([False, False, True]), torch.tensor([True, False, False])
        >>> edge_mask(last, first).nonzero().tolist()
        [[2, 0]]
    """
    return (rearrange(targets, "... t -> ... t 1") & rearrange(sources, "... s -> ... 1 s")).tril()


def removed(
    terms: Terms, mask: Edges, features: Features = None, *, operator: Operator = scan_values
) -> Float[Tensor, "b t h p"]:
    """What the masked edges carry, `(M * mask) x` restricted to the features: subtract it from y to knock them out.

    Args:
        terms: the operands.
        mask: the edges, see `Edges`.
        features: the heads or (head, state) pairs, see `Features`.
        operator: called on terms with other values x; the host's own operator goes here.

    Returns:
        `[b, t, h, p]` in fp32 at least, exactly zero at every position that is no target.

    Raises:
        TermsError: a mask or features of another shape, or not bool.

    Cost: one operator call from the first source to the last target, O(L H P N), for a pair and for every set of
        sources that differs (sets that agree up to their targets are one); a batch takes as many calls as its row
        with the most. For (head, state) pairs B and C are written out per head. Up to 32 targets of up to 32 sources
        take single entries of M instead, O(H N) each after a sum of steps, without a tensor of the length of x more.
    Source: linearity of the operator in x with dt, A, B, C held fixed.

    Example:
        >>> last_from_first = torch.zeros(5, 5, dtype=torch.bool)
        >>> last_from_first[4, 0] = True
        >>> removed(terms, last_from_first)[:, 4]        # is M[4, 0] x_0; zero at positions 0 .. 3
    """
    restricted = _restrict(terms, features)
    carried = terms.precise().x.new_zeros(terms.x.shape)
    for targets, sources in _products(terms, mask):
        is_target, is_source = targets[..., None, None], sources[..., None, None]  # b t 1 1
        to, since = targets.any(0).nonzero()[:, 0].tolist(), sources.any(0).nonzero()[:, 0].tolist()
        if operator is scan_values and len(to) <= FEW and len(since) <= FEW:
            for target in to:
                columns = [source for source in since if source <= target]
                y = _carried_to(restricted, target, columns, sources[:, columns])
                carried[:, target] += torch.where(is_target[:, target], y, 0)
            continue
        span = slice(since[0], to[-1] + 1)
        part = restricted.at(span)
        y = operator(part.with_x(torch.where(is_source[:, span], part.x, 0)))
        carried[:, span] += torch.where(is_target[:, span], y, 0)
    return carried


@in_full_precision
def _carried_to(terms: Terms, target: int, columns: list[int], sources: Bool[Tensor, "#b m"]) -> Float[Tensor, "b h p"]:
    """What one target reads of a few columns, by the entries of M between them."""
    borders = [*columns, target]
    steps = [terms.dt[:, first + 1 : last + 1].sum(1) for first, last in pairwise(borders)]  # b h each
    since = torch.stack(steps, dim=1).flip(1).cumsum(1).flip(1)  # b m h: the steps after a column, up to the target
    decay = rearrange((since[..., None] * terms.A).exp(), "b m (g j) n -> b m g j n", g=terms.groups)
    decay = decay.expand(*decay.shape[:-1], terms.state_size)
    entries = torch.einsum("bgn,bmgjn,bmgn->bmgj", terms.C[:, target], decay, terms.B[:, columns])
    entries = rearrange(entries, "b m g j -> b m (g j)") * terms.dt[:, columns]
    return torch.einsum("bmh,bmhp->bhp", entries * sources[..., None], terms.x[:, columns])


def knockout(
    terms: Terms, mask: Edges, features: Features = None, *, initial_state: Float[Tensor, "b h p n"] | None = None
) -> Float[Tensor, "b t h p"]:
    """y of the recurrence with edges knocked out: as if those entries of M were zero. An initial state is read in full.

    Arguments, errors and cost as for `removed`, and one scan more.

    Example:
        >>> y = knockout(terms, (targets, sources))      # bool [t] each: no target reads any source
    """
    return scan(terms, initial_state)[0] - removed(terms, mask, features)


def _restrict(terms: Terms, features: Features) -> Terms:
    """The terms of the features alone: other heads have no values, other state dimensions are not read."""
    if features is None:
        return terms
    _check_bool("features", features)
    heads, n = terms.heads, terms.state_size
    if features.shape not in ((heads,), (heads, n)):
        raise TermsError(
            f"features must be heads [h] = [{heads}] or pairs [h, n] = [{heads}, {n}], got {list(features.shape)}"
        )
    features = features.to(terms.x.device)
    if features.ndim == 1:
        return terms.with_x(torch.where(rearrange(features, "h -> h 1"), terms.x, 0))
    B, C = (per_head(part, heads) for part in (terms.B, terms.C))
    return replace(terms, B=B, C=torch.where(features, C, 0))


def products(edges: Bool[Tensor, "b t s"]) -> Iterator[tuple[Bool[Tensor, "b t"], Bool[Tensor, "b s"]]]:
    """A mask of edges as targets x sources, as few as can be; each target is in one of them.

    No operator lets a target see a later source, so a set of sources also serves each earlier target whose own set
    agrees with it up to that target. Taking the last open target first therefore gives the fewest sets.

    Example:
        >>> [(targets.tolist(), sources.tolist()) for targets, sources in products(torch.ones(1, 2, 2).bool())]
        [([[True, True]], [[True, True]])]
    """
    edges = edges.tril()
    open_targets = edges.any(-1)  # b t
    last = torch.arange(edges.shape[1], device=edges.device)
    while bool(open_targets.any()):
        chosen = torch.where(open_targets, last, 0).amax(1)  # b
        sources = edges.take_along_dim(rearrange(chosen, "b -> b 1 1"), dim=1)[:, 0]  # b s
        differ = (edges ^ rearrange(sources, "b s -> b 1 s")).tril()
        targets = open_targets & ~differ.any(-1)
        yield targets, sources
        open_targets = open_targets & ~targets


def _products(terms: Terms, mask: Edges) -> Iterator[tuple[Bool[Tensor, "#b t"], Bool[Tensor, "#b s"]]]:
    """The mask as targets x sources, those without an edge left out."""
    if isinstance(mask, tuple):
        if len(mask) != 2:
            raise TermsError(f"a pair of targets and sources is expected, got a tuple of {len(mask)}")
        sources = _expand(terms, "sources", mask[1], 1)
        targets = _expand(terms, "targets", mask[0], 1) & (sources.cumsum(1) > 0)
        if bool(targets.any()):
            yield targets, sources
        return
    yield from products(_expand(terms, "mask", mask, 2))


def _expand(terms: Terms, name: str, mask: Tensor, positions: int) -> Bool[Tensor, "b ..."]:
    """A bool tensor over positions (once or twice) with a batch dimension, checked."""
    _check_bool(name, mask)
    shape = (terms.length,) * positions
    if mask.shape not in (shape, (1, *shape), (terms.batch, *shape)):
        letters = {"mask": "[t, s]", "targets": "[t]", "sources": "[s]"}[name]
        raise TermsError(
            f"{name} must be {letters} = {list(shape)}, or one for each batch row, {[terms.batch, *shape]}; "
            f"got {list(mask.shape)}"
        )
    return mask.to(terms.x.device).reshape(-1, *shape)


def _check_bool(name: str, mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TermsError(f"{name} must be a bool tensor, True where something is knocked out; got {got}")
