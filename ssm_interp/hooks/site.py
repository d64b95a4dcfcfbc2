"""One forward of one hooked mixer: which edits apply, and where in the sequence it stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssm_interp.hooks.checkpointing import as_first_run
from ssm_interp.hooks.errors import HookError, InterventionError
from ssm_interp.hooks.guidance import check_guidance
from ssm_interp.hooks.interventions import FlatPositions, Intervention, RowPositions
from ssm_interp.hooks.points import HookPoints
from ssm_interp.hooks.record import record_of


@dataclass(frozen=True)
class ActiveEdit:
    """An intervention at work on some modules.

    Attributes:
        intervention: what is at work.
        places: ids of the hook points and the attention modules that it works on.
        seen: (id of an attention module, layer) -> positions of the prompt, and of all that it read under this edit.
    """

    intervention: Intervention
    places: frozenset[int]
    seen: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)


Edits = tuple[Intervention, ...]

_active: ContextVar[tuple[ActiveEdit, ...]] = ContextVar("ssm_interp_edits", default=())


@contextmanager
def editing(edits: tuple[ActiveEdit, ...]) -> Iterator[None]:
    """Put edits to work in this thread (or task), beside those that already are."""
    token = _active.set((*_active.get(), *edits))
    try:
        yield
    finally:
        _active.reset(token)


def active_edits(place: nn.Module) -> tuple[ActiveEdit, ...]:
    """The edits at work, in this thread, on hook points or on an attention module."""
    return tuple(edit for edit in _active.get() if id(place) in edit.places)


def edits_at(mixer: Any) -> tuple[Edits, Edits]:
    """The interventions at work on the operator of a mixer, and on the convolution before it."""
    found = _edits_of(mixer.ssm, mixer.layer_idx), _edits_of(mixer.conv1d, mixer.layer_idx)
    return as_first_run(mixer.ssm, found, ((), ()))


def _edits_of(place: nn.Module, layer: int) -> Edits:
    found = (edit.intervention for edit in active_edits(place))
    return tuple(edit for edit in found if edit.layers is None or layer in edit.layers)


class Site:
    """One forward of one mixer.

    Attributes:
        points: the mixer's hook points.
        edits: the interventions at work on the operator.
        conv_edits: those at work on the convolution before it.
        start: how many positions of the sequence came before this call.
        length: positions of this call.
        record: the history of the cache, if there is one.
    """

    def __init__(self, mixer: Any, cache: Any, mask: Tensor | None, length: int) -> None:
        self.points: HookPoints = mixer.ssm
        self.cache, self.mask, self.length = cache, mask, length
        self.layer: int = mixer.layer_idx
        if length == 0:
            raise HookError("the prompt is empty: an SSM layer needs at least one position")
        self.record = None if cache is None else record_of(cache, self.layer)
        self.continues = cache is not None and bool(cache.layers[self.layer].has_previous_state[0])
        self.edits, self.conv_edits = edits_at(mixer)
        self.heads_done = 0
        self._check_history()

    @property
    def prompt(self) -> int:
        """Positions of the prompt: of the first call on the cache, or of this call if it is the first."""
        return self.record.prompt if self.continues and self.record is not None else self.length

    def next_heads(self, count: int) -> slice:
        """Which of the mixer's heads the next operator call computes (Zamba calls once for each of its Mamba heads)."""
        self.heads_done += count
        return slice(self.heads_done - count, self.heads_done)

    def positions(self, positions: FlatPositions | RowPositions | None, batch: int, what: str) -> Tensor:
        """The named positions as a mask over the prompt, `[b, t]`.

        Raises:
            InterventionError: a position outside the prompt or inside padding, or another number of rows.
        """
        mask = None if self.continues else self.mask
        return position_mask(positions, batch, self.prompt, what, mask)

    def close(self) -> None:
        """After the forward: remember where the sequence stands; complain of an operator that was never called."""
        if self.heads_done != self.points.heads:
            raise HookError(
                f"layer {self.layer} computed {self.heads_done} of its {self.points.heads} heads through the operator; "
                "this configuration of the host takes a path that ssm_interp cannot follow"
            )
        if self.record is not None:
            if not self.continues:
                self.record.prompt = self.length
                self.record.known = {*self.edits, *self.conv_edits}
            self.record.seen += self.length

    def _check_history(self) -> None:
        if not self.continues:
            return
        edits = *self.edits, *self.conv_edits
        late = [edit for edit in edits if self.record is None or edit not in self.record.known]
        if late := [edit for edit in late if _looks_back(edit)]:
            raise InterventionError(
                f"layer {self.layer}: {late[0].kind} names positions of a prompt that this cache read without it; "
                "run the prompt and what follows inside the same `edit`"
            )


def position_mask(
    positions: FlatPositions | RowPositions | None, batch: int, length: int, what: str, mask: Tensor | None = None
) -> Tensor:
    """The named positions as a mask over a prompt of some length, `[b, t]`; None names all.

    Args:
        mask: 0 at padding, `[b, t]`.

    Raises:
        InterventionError: a position outside the prompt or inside padding, or another number of rows.
    """
    if positions is None:
        return torch.ones(batch, length, dtype=torch.bool)
    check_guidance(what)
    chosen = torch.zeros(batch, length, dtype=torch.bool)
    for row, named in enumerate(_rows(positions, batch, what)):
        for position in named:
            if not -length <= position < length:
                raise InterventionError(
                    f"{what} names position {position}, but the prompt has {length} positions "
                    f"(0 to {length - 1}, or -{length} to -1)"
                )
            if mask is not None and not mask[row % len(mask), position]:
                raise InterventionError(
                    f"{what} names position {position} of row {row}, which is padding; "
                    "positions are columns of input_ids"
                )
        chosen[row, list(named)] = True
    return chosen


def _looks_back(edit: Intervention) -> bool:
    named = [getattr(edit, name, None) for name in ("sources", "targets", "edges", "position", "positions")]
    return edit.kind == "Knockout" or any(value is not None for value in named)


def _rows(positions: FlatPositions | RowPositions, batch: int, what: str) -> Sequence[FlatPositions]:
    if positions and isinstance(positions[0], tuple):
        if len(positions) != batch:
            raise InterventionError(
                f"{what} names the positions of {len(positions)} rows, but the batch has {batch}; "
                "give one sequence per row, or one flat sequence for all"
            )
        return cast(Sequence[FlatPositions], positions)
    return [cast(FlatPositions, positions)] * batch
