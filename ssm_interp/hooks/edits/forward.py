"""One forward of one hooked mixer: which edits apply, and where in the sequence it stands."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssm_interp.errors import HookError, InterventionError
from ssm_interp.hooks.active import active_edits
from ssm_interp.hooks.edits.masks import Columns, right_padded
from ssm_interp.hooks.intervention import Intervention
from ssm_interp.hooks.interventions import Knockout
from ssm_interp.hooks.points import HookPoint, HookPoints
from ssm_interp.hooks.seam.callers import chunks_of_prompt
from ssm_interp.hooks.seam.checkpointing import as_first_run
from ssm_interp.hooks.seam.operators import Joined, Operator
from ssm_interp.hooks.seam.record import record_of
from ssm_interp.hooks.seam.virtual import check_columns

Edits = tuple[Intervention, ...]


def edits_at(mixer: Any) -> tuple[Edits, Edits]:
    """The interventions at work on the operator of a mixer, and on the convolution before it."""
    points: HookPoints = mixer.ssm
    edits = _edits_of(points, mixer.layer_idx), _edits_of(points.hook_conv, mixer.layer_idx)
    return as_first_run(points, edits, ((), ()))


def _edits_of(points: HookPoints | HookPoint, layer: int) -> Edits:
    interventions = (edit.intervention for edit in active_edits(points))
    return tuple(edit for edit in interventions if edit.acts_at(layer))


class Forward:
    """One forward of one mixer.

    Attributes:
        points: the mixer's hook points.
        edits: the interventions at work on the operator.
        conv_edits: those at work on the convolution before it.
        batch: rows of this call.
        length: positions of this call.
        mask: 0 at the padding of the prompt, `[b t]`; None: nothing says that there is any.
        continues: whether the cache had read positions before this call.
        record: the history of the cache, if there is one.
        given: what stood for the results of operator calls while further ones followed.
    """

    def __init__(self, mixer: Any, cache: Any, mask: Tensor | None, hidden: Tensor) -> None:
        self.points: HookPoints = mixer.ssm
        self.cache = cache
        self.batch, self.length = hidden.shape[:2]
        self.layer: int = mixer.layer_idx
        if self.length == 0:
            raise HookError("the prompt is empty: an SSM layer needs at least one position")
        self.record = None if cache is None else record_of(cache, self.layer)
        self.continues = cache is not None and bool(cache.layers[self.layer].has_previous_state[0])
        self.mask = mask if not self.continues else None if self.record is None else self.record.mask
        self.edits, self.conv_edits = edits_at(mixer)
        self.given: list[Any] = []
        self._calls: list[Operator] = []
        self._check_history()

    @property
    def prompt(self) -> Columns:
        """The columns of the prompt: of the first call on the cache, or of this call if it is the first."""
        length = self.record.prompt if self.continues and self.record is not None else self.length
        return Columns(self.batch, length, self.mask)

    @property
    def seen(self) -> int:
        """Positions that the cache had read before this call."""
        return self.record.seen if self.continues and self.record is not None else 0

    def join(self, call: Operator) -> Operator | None:
        """The operator over all heads, as soon as its last call is made; None: further ones follow."""
        self._calls.append(call)
        if self._heads < self.points.heads:
            self.given.append(call.placeholder())
            return None
        return call if len(self._calls) == 1 else Joined(self._calls, self.given)

    def close(self) -> None:
        """After the forward: remember where the sequence stands; complain of an operator that was never called."""
        if self._heads != self.points.heads:
            raise HookError(
                f"layer {self.layer} computed {self._heads} of its {self.points.heads} heads through the operator; "
                "this configuration of the host takes a path that ssm_interp cannot follow"
            )
        if self.record is not None:
            if not self.continues:
                self.record.prompt, self.record.mask = self.length, self.mask
                self.record.known = {*self.edits, *self.conv_edits}
            self.record.seen += self.length

    @property
    def _heads(self) -> int:
        return sum(call.operands.x.shape[2] for call in self._calls)

    def _check_history(self) -> None:
        naming = [edit for edit in (*self.edits, *self.conv_edits) if _looks_back(edit)]
        if naming and not self.continues and (chunks := chunks_of_prompt()) > 1:
            raise InterventionError(
                f"layer {self.layer}: {naming[0].kind} names positions of the prompt, which `generate` reads in "
                f"{chunks} chunks, so that its end is not yet known; call generate without prefill_chunk_size"
            )
        if not self.continues:
            if naming:
                check_columns(f"layer {self.layer}: {naming[0].kind}", self.length)
            return
        if self.edits or self.conv_edits or self.points.requested:
            self._check_padding()
        late = [edit for edit in naming if self.record is None or edit not in self.record.known]
        if late:
            raise InterventionError(
                f"layer {self.layer}: {late[0].kind} names positions of a prompt that this cache read without it; "
                "run the prompt and what follows inside the same `edit`"
            )

    def _check_padding(self) -> None:
        if rows := right_padded(self.mask):
            raise HookError(
                f"layer {self.layer} goes on from a cache that read right-padded rows ({rows[:5]}): their convolution "
                "and SSM states are those after the padding, not after their last token; pad on the left"
            )


def _looks_back(edit: Intervention) -> bool:
    return isinstance(edit, Knockout) or edit.names_positions
