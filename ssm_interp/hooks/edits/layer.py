"""The interventions at one layer, applied to one operator call."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import TypeVar

import torch
from einops import rearrange, repeat
from torch import Tensor

from ssm_interp.errors import InterventionError
from ssm_interp.hooks.edits.forward import Forward
from ssm_interp.hooks.edits.masks import feature_mask
from ssm_interp.hooks.edits.pieces import Piece, disjoint
from ssm_interp.hooks.intervention import Intervention
from ssm_interp.hooks.interventions import EditAttention, Knockout, PatchState, ScaleFeatures, SetDelta
from ssm_interp.hooks.seam.operators import Operands
from ssm_interp.hooks.seam.record import remember, remembered
from ssm_interp.scan import Terms, attention_rows, read, removed, scan, write
from ssm_interp.scan.recurrence import accumulate, decays

Kind = TypeVar("Kind", bound=Intervention)


@dataclass(frozen=True)
class Cut:
    """A position after which the state of some features is replaced, in some rows of the batch."""

    position: int
    rows: Tensor  # bool b
    features: Tensor  # bool h #n
    state: Tensor  # b h p n, or any shape that broadcasts to it

    def apply(self, state: Tensor, wipe: bool) -> Tensor:
        where = rearrange(self.rows, "b -> b 1 1 1") & rearrange(self.features, "h n -> h 1 n")  # b h 1 #n
        return torch.where(where, 0.0 if wipe else self.state.to(state), state)

    def overlaps(self, other: Cut) -> bool:
        """Whether another cut at the same position replaces some of the same state."""
        return bool((self.rows & other.rows).any() and (self.features & other.features).any())

    def piece(self, length: int) -> Piece:
        """The edges that this cut leaves nothing of: those from before it (or at it) to after it (or at it)."""
        column = torch.arange(length, device=self.rows.device)
        rows = rearrange(self.rows, "b -> b 1")
        return Piece(rows & (column >= self.position), rows & (column <= self.position), self.features)


@dataclass(frozen=True)
class Injected:
    """What hooks on write and state make of the states of a call.

    Attributes:
        writes: what positions write in addition, `[b t h p n]`; None: nothing.
        states: what is added to the states by all of it, `[b t h p n]`.
        replaced: bool `[b t h p n]`, where a state was given another value than the recurrence does; None: nowhere.
    """

    writes: Tensor | None
    states: Tensor
    replaced: Tensor | None


class LayerEdits:
    """The interventions that act on one operator call, with positions and features resolved."""

    def __init__(self, forward: Forward, operands: Operands) -> None:
        self.forward = forward
        self.batch, self.device = forward.batch, operands.x.device
        self._cuts = sorted(self._find_cuts(operands), key=lambda cut: cut.position)
        self._cuts_at = {at: list(cuts) for at, cuts in groupby(self._cuts, key=lambda cut: cut.position)}
        if any(cut.overlaps(other) for cuts in self._cuts_at.values() for cut, other in combinations(cuts, 2)):
            raise InterventionError(
                f"layer {forward.layer}: two PatchState replace the same state; edits have no order, so give it one "
                "value"
            )

    def __bool__(self) -> bool:
        return bool(self.forward.edits)

    @property
    def needs_own_scan(self) -> bool:
        """Whether the host's operator cannot do it: states are replaced inside, or single state dimensions scaled."""
        return bool(self._cuts) or any(_of_pairs(edit) for edit in self._of(ScaleFeatures))

    def set_delta(self, dt: Tensor) -> Tensor:
        """The steps with every SetDelta applied, `[b t h]`."""
        taken = torch.zeros(dt.shape, dtype=torch.bool, device=self.device)
        for edit in self._of(SetDelta):
            where = rearrange(self._where(edit), "b t -> b t 1") & self._features(edit)[:, 0]
            if (where & taken).any():
                raise InterventionError(
                    f"layer {self.forward.layer}: two SetDelta set the same step; edits have no order, "
                    "so give it one value"
                )
            dt, taken = torch.where(where, edit.value, dt), taken | where
        return dt

    def scale_reads(self, terms: Terms) -> Terms:
        """C scaled for the ScaleFeatures of (head, state) pairs; B and C are then written out per head."""
        for edit in self._of(ScaleFeatures):
            if _of_pairs(edit):
                where = rearrange(self._where(edit), "b t -> b t 1 1") & self._features(edit)
                each = terms.heads // terms.groups
                B, C = (repeat(part, "b t g n -> b t (g each) n", each=each) for part in (terms.B, terms.C))
                terms = replace(terms, B=B, C=torch.where(where, C * edit.factor, C))
        return terms

    def scale_heads(self, y: Tensor) -> Tensor:
        """y with every ScaleFeatures of whole heads applied, `[b t h p]`."""
        for edit in self._of(ScaleFeatures):
            if not _of_pairs(edit):
                where = rearrange(self._where(edit), "b t -> b t 1") & self._features(edit)[:, 0]
                y = torch.where(rearrange(where, "b t h -> b t h 1"), y * edit.factor, y)
        return y

    def scan(self, terms: Terms, initial: Tensor | None, *, wipe: bool = False) -> tuple[Tensor, Tensor]:
        """The recurrence with the states of every PatchState put in (or wiped): y and the final state."""
        ys, state = [], initial
        for begin, end, cuts in self._segments(terms.length):
            part = terms.at(slice(begin, end))
            y, state = scan(part, state)
            for cut in cuts:
                state = cut.apply(state, wipe)
                y = torch.cat([y[:, :-1], read(state[:, None], part.C[:, -1:])], dim=1)
            ys.append(y)
        assert state is not None
        return torch.cat(ys, dim=1), state

    def states(self, terms: Terms, initial: Tensor | None) -> Tensor:
        """Every state of that recurrence, `[b t h p n]`."""
        states: list[Tensor] = []
        state, writes = initial, write(terms)
        for begin, end, cuts in self._segments(terms.length):
            states += accumulate(terms.at(slice(begin, end)), writes[:, begin:end], state)
            for cut in cuts:
                states[-1] = cut.apply(states[-1], wipe=False)
            state = states[-1]
        return torch.stack(states, dim=1)

    def accumulate(
        self, terms: Terms, writes: Tensor, replaced: Tensor | None = None, before: Tensor | None = None
    ) -> Tensor:
        """What additional writes `[b t h p n]` add to every state; where a state is replaced, nothing of those before
        it is left: by a PatchState, or as `replaced`, bool `[b t h p n]`, says."""
        state = writes.new_zeros(writes[:, 0].shape) if before is None else before.to(writes)
        states = []
        for position, (decay, added) in enumerate(zip(decays(terms), writes.unbind(1), strict=True)):
            state = self._wiped(torch.addcmul(added, decay, state), position)
            state = state if replaced is None else torch.where(replaced[:, position], 0, state)
            states.append(state)
        return torch.stack(states, dim=1)

    def replace(self, terms: Terms, shift: Tensor) -> Tensor:
        """How states move that a hook moved by `shift` `[b t h p n]`: a state that it gave another value has that
        value, and one that it gave back goes on from what came before.

        The shift is added there too: it is zero, and carries the gradient to what the hook gave back.
        """
        state = shift.new_zeros(shift[:, 0].shape)
        states = []
        for position, (decay, moved) in enumerate(zip(decays(terms), shift.unbind(1), strict=True)):
            state = self._wiped(decay * state, position)
            state = torch.where(moved != 0, moved, state + moved)
            states.append(state)
        return torch.stack(states, dim=1)

    def edit_attention(self, terms: Terms) -> Tensor:
        """`(M' - M) x` of every EditAttention, `[b t h p]`, or 0."""
        change = terms.x.new_zeros(())
        for edit in self._of(EditAttention):
            if not self.forward.continues:
                change = change + self._attention_change(terms, edit)
        return change

    def knocked_out(self, terms: Terms, injected: Injected | None) -> Tensor:
        """What all knocked-out edges carry, `[b t h p]`, or 0; an edge that two knockouts name is removed once."""
        knockouts = self._of(Knockout)
        carried = terms.x.new_zeros(())
        if not self.forward.continues:
            taken = [cut.piece(terms.length) for cut in self._cuts]
            for piece in disjoint((self._pieces(edit) for edit in knockouts), taken):
                carried = carried + self._carried_by(terms, piece, injected)
        open_ended = tuple(edit for edit in knockouts if edit.is_open_ended)
        if open_ended and self.forward.cache is not None:
            for number, piece in enumerate(disjoint([self._source_piece(edit)] for edit in open_ended)):
                carried = carried + self._carried_on(terms, piece, (open_ended, number), injected)
        return carried

    def _carried_by(self, terms: Terms, piece: Piece, injected: Injected | None) -> Tensor:
        """What a piece's edges carry, `[b t h p]`."""
        if injected is None or (injected.writes is None and injected.replaced is None):
            return removed(terms, (piece.targets, piece.sources), piece.as_features())
        kept = torch.where(rearrange(piece.sources, "b t -> b t 1 1 1"), _all_writes(terms, injected), 0)
        states = self.accumulate(terms, kept, injected.replaced) * rearrange(piece.features, "h n -> h 1 n")
        return torch.where(rearrange(piece.targets, "b t -> b t 1 1"), read(states, terms.C), 0)

    def _carried_on(self, terms: Terms, piece: Piece, key: Hashable, injected: Injected | None) -> Tensor:
        """Keep the part of the state that open-ended knockouts' sources wrote with the cache, for the next call; and
        give what it carries to this one, if that goes on from an earlier one, `[b t h p]`, else 0."""
        before, continues = remembered(self.forward.cache, self.forward.layer, key), self.forward.continues
        if before is None and continues:
            raise InterventionError(
                f"layer {self.forward.layer}: the knockouts at work are not those under which this cache read its "
                "prompt and everything since; run the prompt and what follows inside the same `edit`"
            )
        sources = piece.sources[:, -1:].expand(-1, self.forward.length) if continues else piece.sources[:, :-1]
        carried = terms.x.new_zeros(())
        if continues or injected is not None:
            kept = write(terms) if injected is None else _all_writes(terms, injected)
            kept = torch.where(rearrange(sources, "b t -> b t 1 1 1"), kept, 0)
            states = self.accumulate(terms, kept, None if injected is None else injected.replaced, before)
            state = states[:, -1]
            if continues:
                carried = read(states * rearrange(piece.features, "h n -> h 1 n"), terms.C)
        else:
            part = terms.with_x(torch.where(rearrange(sources, "b t -> b t 1 1"), terms.x, 0))
            state = self.scan(part, None, wipe=True)[1]
        remember(self.forward.cache, self.forward.layer, key, state.detach(), self.forward.length)
        return carried

    def _attention_change(self, terms: Terms, edit: EditAttention) -> Tensor:
        columns = [(_column(self.forward, t, edit), _column(self.forward, s, edit)) for t, s in edit.edges]
        targets = sorted({target for target, _ in columns})
        rows = attention_rows(terms, targets)  # b h r s
        new = rows
        features = self._features(edit)[:, 0]
        for target, source in columns:
            row = targets.index(target)
            if source > target:
                raise InterventionError(
                    f"EditAttention names the edge {target} <- {source}: a position cannot read a later one"
                )
            here = torch.zeros_like(rows, dtype=torch.bool)
            here[:, features, row, source] = True
            changed = {"set": torch.full_like(rows, edit.value), "add": new + edit.value, "scale": new * edit.value}
            new = torch.where(here, changed[edit.mode], new)
        change = torch.zeros_like(terms.x)
        change[:, targets] = torch.einsum("bhrs,bshp->brhp", new - rows, terms.x)
        return change

    def _wiped(self, state: Tensor, position: int) -> Tensor:
        """What is left of a state after the cuts at a position."""
        for cut in self._cuts_at.get(position, ()):
            state = cut.apply(state, wipe=True)
        return state

    def _segments(self, length: int) -> Iterator[tuple[int, int, list[Cut]]]:
        """Runs of positions (begin, end), each with the cuts at its last one."""
        begin = 0
        for end in sorted({position + 1 for position in self._cuts_at} | {length}):
            yield begin, end, self._cuts_at.get(end - 1, [])
            begin = end

    def _find_cuts(self, operands: Operands) -> Iterator[Cut]:
        for edit in [] if self.forward.continues else self._of(PatchState):
            where = self.forward.prompt.positions(edit.position, "PatchState.position").to(self.device)
            state = self._patch(edit, operands)
            for position in where.any(0).nonzero()[:, 0].tolist():
                yield Cut(position, where[:, position], self._features(edit), state)

    def _patch(self, edit: PatchState, operands: Operands) -> Tensor:
        state = torch.as_tensor(edit.state, device=self.device)
        if state.ndim == 0:
            return state
        points, head_dim = self.forward.points, operands.x.shape[3]
        expected = (points.heads, head_dim, points.state_size)
        if tuple(state.shape[-3:]) != expected or (state.ndim == 4 and state.shape[0] not in (1, self.batch)):
            raise InterventionError(
                f"layer {self.forward.layer}: PatchState.state is {list(state.shape)}, but the state here is [h p n] = "
                f"{list(expected)} in a batch of {self.batch}"
            )
        return state

    def _pieces(self, edit: Knockout) -> list[Piece]:
        """The edges of a knockout inside the prompt."""
        features, edges = self._features(edit), self.forward.prompt.edges(edit)
        return [Piece(targets.to(self.device), sources.to(self.device), features) for targets, sources in edges]

    def _source_piece(self, edit: Knockout) -> Piece:
        """The sources of a knockout in the prompt, `[b t]`, and in one column more, whether generated positions are
        too."""
        prompt = self.forward.prompt
        ((_, sources),) = prompt.edges_over(edit, prompt.length + 1)
        sources = sources.to(self.device)
        return Piece(torch.ones_like(sources[:, :1]), sources, self._features(edit))

    def _where(self, edit: SetDelta | ScaleFeatures) -> Tensor:
        """The positions of this call at which an intervention acts, `[b t]`."""
        if self.forward.continues or edit.positions is None:
            return torch.full((self.batch, self.forward.length), edit.positions is None, device=self.device)
        return self.forward.prompt.positions(edit.positions, f"{edit.kind}.positions").to(self.device)

    def _features(self, edit: Intervention) -> Tensor:
        """The features of an intervention: `[h 1]` for heads, `[h n]` for pairs."""
        points = self.forward.points
        return feature_mask(edit.features, points.heads, points.state_size, self.device)

    def _of(self, kind: type[Kind]) -> list[Kind]:
        return [edit for edit in self.forward.edits if isinstance(edit, kind)]


def _column(forward: Forward, position: int, edit: EditAttention) -> int:
    """The column of a position that must be the same in every row."""
    columns = forward.prompt.column(position, f"{edit.kind}.edges").unique()  # type: ignore[no-untyped-call]
    if len(columns) > 1:
        raise InterventionError(
            f"{edit.kind}.edges names position {position}, which is column {columns.tolist()} in different rows; "
            "give columns from the start, or rows of one length"
        )
    return int(columns[0])


def _of_pairs(edit: Intervention) -> bool:
    return isinstance(edit.features, tuple) and isinstance(edit.features[0], tuple)


def _all_writes(terms: Terms, injected: Injected) -> Tensor:
    writes = write(terms)
    return writes if injected.writes is None else writes + injected.writes
