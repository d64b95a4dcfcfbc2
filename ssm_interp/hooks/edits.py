"""The interventions at one layer, applied to one operator call."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeVar

import torch
from torch import Tensor

from ssm_interp.hooks.errors import InterventionError
from ssm_interp.hooks.interventions import (
    EditAttention,
    Intervention,
    Knockout,
    PatchState,
    ScaleFeatures,
    SetDelta,
)
from ssm_interp.hooks.operators import Operands
from ssm_interp.hooks.pieces import Piece, disjoint
from ssm_interp.hooks.plan import feature_mask
from ssm_interp.hooks.record import remember, remembered
from ssm_interp.hooks.site import Site
from ssm_interp.scan import Terms, attention_rows, read, removed, scan, write
from ssm_interp.scan.recurrence import accumulate

Kind = TypeVar("Kind", bound=Intervention)


@dataclass(frozen=True)
class Cut:
    """A position after which the state of some features is replaced, in some rows of the batch."""

    position: int
    rows: Tensor  # bool b
    features: Tensor  # bool h #n
    state: Tensor  # b h p n, or any shape that broadcasts to it

    def apply(self, state: Tensor, wipe: bool) -> Tensor:
        where = self.rows[:, None, None, None] & self.features[:, None, :]
        return torch.where(where, 0.0 if wipe else self.state.to(state), state)

    def overlaps(self, other: Cut) -> bool:
        shared = (self.rows & other.rows).any() and (self.features & other.features).any()
        return self.position == other.position and bool(shared)

    def piece(self, length: int) -> Piece:
        """The edges that this cut leaves nothing of: those from before it (or at it) to after it (or at it)."""
        where = torch.arange(length, device=self.rows.device)
        across = (where[:, None] >= self.position) & (where <= self.position)
        return Piece(self.rows[:, None, None] & across, self.features)


class LayerEdits:
    """The interventions that act on one operator call, with positions and features resolved.

    Attributes:
        heads: which of the mixer's heads the call computes.
    """

    def __init__(self, site: Site, heads: slice, operands: Operands) -> None:
        self.site, self.heads = site, heads
        self.batch, self.device = operands.x.shape[0], operands.x.device
        self._cuts = sorted(self._find_cuts(operands), key=lambda cut: cut.position)
        if any(one.overlaps(other) for one, other in combinations(self._cuts, 2)):
            raise InterventionError(
                f"layer {site.layer}: two PatchState replace the same state; edits have no order, so give it one value"
            )

    def __bool__(self) -> bool:
        return bool(self.site.edits)

    @property
    def needs_own_scan(self) -> bool:
        """Whether the host's operator cannot do it: states are replaced inside, or single state dimensions scaled."""
        return bool(self._cuts) or any(_of_pairs(edit) for edit in self._of(ScaleFeatures))

    def set_delta(self, dt: Tensor) -> Tensor:
        """The steps with every SetDelta applied, `[b t h]`."""
        taken = torch.zeros(dt.shape, dtype=torch.bool, device=self.device)
        for edit in self._of(SetDelta):
            where = self._where(edit)[:, :, None] & self._features(edit)[:, 0]
            if (where & taken).any():
                raise InterventionError(
                    f"layer {self.site.layer}: two SetDelta set the same step; edits have no order, "
                    "so give it one value"
                )
            dt, taken = torch.where(where, edit.value, dt), taken | where
        return dt

    def scale_reads(self, terms: Terms) -> Terms:
        """C scaled for the ScaleFeatures of (head, state) pairs; B and C are then written out per head."""
        for edit in self._of(ScaleFeatures):
            if _of_pairs(edit):
                where = self._where(edit)[:, :, None, None] & self._features(edit)
                each = terms.heads // terms.groups
                B, C = (part.repeat_interleave(each, dim=2) for part in (terms.B, terms.C))
                terms = replace(terms, B=B, C=torch.where(where, C * edit.factor, C))
        return terms

    def scale_heads(self, y: Tensor) -> Tensor:
        """y with every ScaleFeatures of whole heads applied, `[b t h p]`."""
        for edit in self._of(ScaleFeatures):
            if not _of_pairs(edit):
                where = self._where(edit)[:, :, None] & self._features(edit)[:, 0]
                y = torch.where(where[..., None], y * edit.factor, y)
        return y

    def scan(self, terms: Terms, initial: Tensor | None, *, wipe: bool = False) -> tuple[Tensor, Tensor]:
        """The recurrence with the states of every PatchState put in (or wiped): y and the final state."""
        found, state = [], initial
        for begin, end, cuts in self._segments(terms.length):
            part = terms.at(slice(begin, end))
            y, state = scan(part, state)
            for cut in cuts:
                state = cut.apply(state, wipe)
                y = torch.cat([y[:, :-1], read(state[:, None], part.C[:, -1:])], dim=1)
            found.append(y)
        assert state is not None
        return torch.cat(found, dim=1), state

    def states(self, terms: Terms, initial: Tensor | None) -> Tensor:
        """Every state of that recurrence, `[b t h p n]`."""
        return self._accumulate(terms, write(terms), initial, wipe=False)

    def accumulate(self, terms: Terms, writes: Tensor) -> Tensor:
        """What additional writes `[b t h p n]` add to every state; a PatchState leaves nothing of those before it."""
        return self._accumulate(terms, writes, None, wipe=True)

    def edit_attention(self, terms: Terms) -> Tensor:
        """`(M' - M) x` of every EditAttention, `[b t h p]`, or 0."""
        change = terms.x.new_zeros(())
        for edit in self._of(EditAttention):
            if not self.site.continues:
                change = change + self._attention_change(terms, edit)
        return change

    def knocked_out(self, terms: Terms, extra_writes: Tensor | None) -> Tensor:
        """What all knocked-out edges carry, `[b t h p]`, or 0; an edge that two knockouts name is removed once."""
        knockouts = self._of(Knockout)
        carried = terms.x.new_zeros(())
        if not self.site.continues:
            taken = [cut.piece(terms.length) for cut in self._cuts]
            for piece in disjoint((self._piece(edit) for edit in knockouts), taken):
                carried = carried + removed(terms, piece.edges, piece.as_features())
                if extra_writes is not None:
                    carried = carried + _removed_writes(terms, extra_writes, piece)
        open_ended = tuple(edit for edit in knockouts if edit.targets is None and edit.edges is None)
        if open_ended and self.site.cache is not None:
            for number, piece in enumerate(disjoint(self._source_piece(edit) for edit in open_ended)):
                key = (open_ended, number, self.heads.start)
                carried = carried + self._carried_on(terms, piece, key, extra_writes)
        return carried

    def _carried_on(self, terms: Terms, piece: Piece, key: Hashable, extra_writes: Tensor | None) -> Tensor:
        """Keep the part of the state that open-ended knockouts' sources wrote with the cache, for the next call; and
        give what it carries to this one, if that goes on from an earlier one, `[b t h p]`, else 0."""
        site = self.site
        before = remembered(site.cache, site.layer, key)
        if before is None and site.continues:
            raise InterventionError(
                f"layer {site.layer}: the knockouts at work are not those under which this cache read its prompt and "
                "everything since; run the prompt and what follows inside the same `edit`"
            )
        sources = piece.edges[:, -1:].expand(-1, site.length) if site.continues else piece.edges[:, :-1]
        part = terms.with_x(torch.where(sources[:, :, None, None], terms.x, 0))
        extra = None if extra_writes is None else torch.where(sources[:, :, None, None, None], extra_writes, 0)
        if site.continues:
            states = torch.stack(list(accumulate(part, write(part), before)), dim=1)
            states = states if extra is None else states + self.accumulate(terms, extra)
            carried, state = read(states * piece.features[:, None, :], terms.C), states[:, -1]
        else:
            carried, state = terms.x.new_zeros(()), self.scan(part, None, wipe=True)[1]
            state = state if extra is None else state + self.accumulate(terms, extra)[:, -1]
        remember(site.cache, site.layer, key, state.detach(), site.length)
        return carried

    def _attention_change(self, terms: Terms, edit: EditAttention) -> Tensor:
        targets = sorted({_column(target, edit, self.site, self.batch) for target, _ in edit.edges})
        rows = attention_rows(terms, targets)  # b h r s
        new = rows
        features = self._features(edit)[:, 0]
        for target, source in edit.edges:
            row, column = (
                targets.index(_column(target, edit, self.site, self.batch)),
                _column(source, edit, self.site, self.batch),
            )
            if column > targets[row]:
                raise InterventionError(
                    f"EditAttention names the edge {targets[row]} <- {column}: a position cannot read a later one"
                )
            here = torch.zeros_like(rows, dtype=torch.bool)
            here[:, features, row, column] = True
            changed = {"set": torch.full_like(rows, edit.value), "add": new + edit.value, "scale": new * edit.value}
            new = torch.where(here, changed[edit.mode], new)
        change = torch.zeros_like(terms.x)
        change[:, targets] = torch.einsum("bhrs,bshp->brhp", new - rows, terms.x)
        return change

    def _accumulate(self, terms: Terms, writes: Tensor, initial: Tensor | None, *, wipe: bool) -> Tensor:
        found: list[Tensor] = []
        state = initial
        for begin, end, cuts in self._segments(terms.length):
            found += accumulate(terms.at(slice(begin, end)), writes[:, begin:end], state)
            for cut in cuts:
                found[-1] = cut.apply(found[-1], wipe)
            state = found[-1]
        return torch.stack(found, dim=1)

    def _segments(self, length: int) -> Iterator[tuple[int, int, list[Cut]]]:
        """Runs of positions (begin, end), each with the cuts at its last one."""
        begin = 0
        for end in sorted({cut.position + 1 for cut in self._cuts} | {length}):
            yield begin, end, [cut for cut in self._cuts if cut.position + 1 == end]
            begin = end

    def _find_cuts(self, operands: Operands) -> Iterator[Cut]:
        for edit in [] if self.site.continues else self._of(PatchState):
            where = self.site.positions(edit.position, self.batch, "PatchState.position").to(self.device)
            state = self._patch(edit, operands)
            for position in where.any(0).nonzero()[:, 0].tolist():
                yield Cut(position, where[:, position], self._features(edit), state)

    def _patch(self, edit: PatchState, operands: Operands) -> Tensor:
        state: Tensor = edit.state.to(self.device)
        if state.ndim == 0:
            return state
        points, head_dim = self.site.points, operands.x.shape[3]
        expected = (points.heads, head_dim, points.state_size)
        if tuple(state.shape[-3:]) != expected or (state.ndim == 4 and state.shape[0] not in (1, self.batch)):
            raise InterventionError(
                f"layer {self.site.layer}: PatchState.state is {list(state.shape)}, but the state here is [h p n] = "
                f"{list(expected)} in a batch of {self.batch}"
            )
        return state[..., self.heads, :, :]

    def _piece(self, edit: Knockout) -> Piece:
        """The edges of a knockout inside the prompt, `[b t s]`."""
        return Piece(edge_mask(edit, self.site, self.batch).to(self.device), self._features(edit))

    def _source_piece(self, edit: Knockout) -> Piece:
        """The sources of a knockout in the prompt, `[b t]`, and in one column more, whether generated positions are
        too."""
        prompt = self.site.positions(edit.sources, self.batch, "Knockout.sources")
        generated = torch.full((self.batch, 1), edit.sources is None)
        return Piece(torch.cat([prompt, generated], dim=1).to(self.device), self._features(edit))

    def _where(self, edit: SetDelta | ScaleFeatures) -> Tensor:
        """The positions of this call at which an intervention acts, `[b t]`."""
        if self.site.continues or edit.positions is None:
            return torch.full((self.batch, self.site.length), edit.positions is None, device=self.device)
        return self.site.positions(edit.positions, self.batch, f"{edit.kind}.positions").to(self.device)

    def _features(self, edit: Intervention) -> Tensor:
        """The features of an intervention among the heads of this call: `[h 1]` for heads, `[h n]` for pairs."""
        points = self.site.points
        return feature_mask(edit.features, points.heads, points.state_size, self.device)[self.heads]

    def _of(self, kind: type[Kind]) -> list[Kind]:
        return [edit for edit in self.site.edits if isinstance(edit, kind)]


def edge_mask(edit: Knockout, site: Site, batch: int) -> Tensor:
    """The edges of a knockout inside the prompt, bool `[b t s]`."""
    if edit.edges is None:
        targets = site.positions(edit.targets, batch, "Knockout.targets")
        sources = site.positions(edit.sources, batch, "Knockout.sources")
        return (targets[:, :, None] & sources[:, None, :]).tril()
    edges = torch.zeros(batch, site.prompt, site.prompt, dtype=torch.bool)
    for target, source in edit.edges:
        edges[:, _column(target, edit, site, batch), _column(source, edit, site, batch)] = True
    return edges.tril()


def _column(position: int, edit: Knockout | EditAttention, site: Site, batch: int) -> int:
    chosen = site.positions((position,), batch, f"{edit.kind}.edges")
    return int(chosen[0].nonzero()[0, 0])


def _of_pairs(edit: Intervention) -> bool:
    return edit.features is not None and isinstance(edit.features[0], tuple)


def _removed_writes(terms: Terms, writes: Tensor, piece: Piece) -> Tensor:
    """What additional writes `[b t h p n]` carry along a piece's edges, `[b t h p]`."""
    carried = torch.zeros_like(terms.x)
    for target in piece.edges.any(0).any(-1).nonzero()[:, 0].tolist():
        upto = slice(0, target + 1)
        kept = torch.where(piece.edges[:, target, upto, None, None, None], writes[:, upto], 0)
        *_, state = accumulate(terms.at(upto), kept)
        carried[:, target] = read((state * piece.features[:, None, :])[:, None], terms.C[:, target : target + 1])[:, 0]
    return carried
