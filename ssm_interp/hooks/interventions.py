"""Interventions as data: what to change, where. `Attachment.edit` puts them to work."""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import torch
from pydantic import field_validator, model_validator
from torch import Tensor

from ssm_interp.arguments import Pairs, Positions, Streams, as_number, as_pairs, as_positions, as_streams
from ssm_interp.errors import InterventionError
from ssm_interp.hooks.intervention import Intervention
from ssm_interp.reprs import describe

State: TypeAlias = Tensor | float


class Knockout(Intervention):
    """Remove edges target <- source: the targets no longer read what the sources wrote (nothing is re-normalised).

    Every pair of `targets` x `sources` is removed, a position that is both included (its edge to itself), or else the
    listed `edges`. The D-skip and the decay of the sources stay; so does what the convolution before the operator
    carries from the last tokens (three, usually), unless the knockout goes `through` it too: then the x, dt, B and C of
    the targets are computed as if what the sources give to the convolution were zero.

    In softmax attention an edge is masked before the softmax, so what is left is re-normalised (Geva et al. 2023,
    arXiv 2304.14767, section 4); the causal mask stays; a target that is left with nothing to read gets zero. Features
    are then attention heads.

    Attributes:
        sources: positions that are no longer read.
        targets: positions that no longer read them. None: also every generated position.
        edges: (target, source) pairs, in place of `sources` and `targets`; one with its source after its target does
            not exist. When none exists in any row of a prompt, the forward raises; when some do not, it warns.
        through: the streams that edges are removed from: "ssm", "conv" (the convolution before the SSM),
            "attention" (softmax), or several. None: "ssm" in a model that has SSM layers, else "attention".

    Cost: one more call of the operator from the first source to the last target, O(L H P N); no matrix. In softmax
        attention a mask of targets x sources.
    Source: Mamba Knockout (Endy et al., ACL 2025), section 3.

    Raises:
        InterventionError: edges together with sources or targets; positions or features that are not integers; an
            empty list; an unknown stream.

    Example:
        >>> Knockout(sources=[2, 3], targets=-1, layers=range(3, 12))
        >>> Knockout(sources="subject", targets="last", layers=range(3, 12))          # resolved by a batch of prompts
        >>> Knockout(sources=[2, 3], targets=-1, through=("ssm", "attention"))               # both streams of a hybrid
        >>> Knockout(sources=[6, 7], targets=8, through=("ssm", "conv"))         # nothing leaks through the convolution
        >>> Knockout(sources=[[2, 3], [4]], targets=-1, features=[0, 5])     # two rows, each its own sources
    """

    kind: ClassVar[str] = "Knockout"
    position_fields: ClassVar[tuple[str, ...]] = ("sources", "targets")

    sources: Positions | None = None
    targets: Positions | None = None
    edges: Pairs | None = None
    through: Streams | None = None

    @field_validator("sources", "targets", mode="plain")
    @classmethod
    def _positions(cls, value: Any, info: Any) -> Positions | None:
        return as_positions(value, f"{cls.kind}.{info.field_name}")

    @field_validator("edges", mode="plain")
    @classmethod
    def _edges(cls, value: Any) -> Pairs | None:
        return _edges_of(cls.kind, value)

    @field_validator("through", mode="plain")
    @classmethod
    def _through(cls, value: Any) -> Streams | None:
        return as_streams(value)

    @model_validator(mode="after")
    def _either(self) -> Knockout:
        if self.edges is not None and (self.sources is not None or self.targets is not None):
            raise InterventionError("Knockout takes either `edges`, or `sources` and `targets`, not both")
        return self

    @property
    def names_positions(self) -> bool:
        """Whether it is restricted to some edges."""
        return self.edges is not None or super().names_positions

    @property
    def is_open_ended(self) -> bool:
        """Whether generated positions are among its targets."""
        return self.targets is None and self.edges is None


class PatchState(Intervention):
    """Replace the state after a position, or after several; later positions, and the reading there, go on from it.

    Attributes:
        position: where: one position or a sequence, the same in every row of the batch, or one sequence per row.
        state: the new state, `[h, p, n]` or (for each row) `[b, h, p, n]`, or one number for all of it (0.0 wipes it);
            at several positions the same at each. For different ones give several PatchState.

    Cost: the layer runs through the library's own recurrence, O(L H P N).

    Raises:
        InterventionError: no position; a state that is neither a number nor such a tensor.

    Example:
        >>> donor = ssm.run(other, read=["state"], layers=[3])["state", 3][:, -1]
        >>> PatchState(position=-1, state=donor, layers=[3])
        >>> PatchState(position=[3, 4], state=0.0)              # wiped after 3, and again after 4, in every row
        >>> PatchState(position=[[3], [5]], state=0.0)          # two rows, each its own position
    """

    kind: ClassVar[str] = "PatchState"
    position_fields: ClassVar[tuple[str, ...]] = ("position",)

    position: Positions
    state: State

    @field_validator("position", mode="plain")
    @classmethod
    def _position(cls, value: Any) -> Positions:
        positions = () if isinstance(value, list | tuple) and not value else as_positions(value, "PatchState.position")
        if not positions or set(positions) == {()}:
            raise InterventionError(
                "PatchState.position must name a position: an integer, a sequence of integers (the same in every row), "
                "or one such sequence per row"
            )
        return positions

    @field_validator("state", mode="plain")
    @classmethod
    def _state(cls, value: Any) -> Tensor:
        try:
            state = value.clone() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise InterventionError(
                f"PatchState.state must be a number, or a tensor [h p n] or [b h p n], got {describe(value)}; of "
                'what `run` read at every position one is run["state", layer][:, position]'
            ) from None
        if state.ndim not in (0, 3, 4):
            raise InterventionError(f"PatchState.state must be a number, [h p n] or [b h p n], got {list(state.shape)}")
        if state.is_meta or state.is_complex() or torch.bool in (state.dtype, torch.as_tensor(value).dtype):
            raise InterventionError(f"PatchState.state must be real numbers, got {state.dtype} on {state.device.type}")
        if not state.isfinite().all():
            raise InterventionError("PatchState.state has entries that are not finite (nan or inf)")
        return state


class _AtPositions(Intervention):
    """What acts at some positions, or at every one."""

    position_fields: ClassVar[tuple[str, ...]] = ("positions",)

    positions: Positions | None = None

    @field_validator("positions", mode="plain")
    @classmethod
    def _positions(cls, value: Any) -> Positions | None:
        return as_positions(value, f"{cls.kind}.positions")


class _OfHeads(Intervention):
    """What acts on whole heads."""

    @model_validator(mode="after")
    def _only_heads(self) -> _OfHeads:
        if isinstance(self.features, tuple) and isinstance(self.features[0], tuple):
            raise InterventionError(f"{self.kind} acts on heads; it takes no (head, state) pairs as features")
        return self


class SetDelta(_OfHeads, _AtPositions):
    """Set the effective step dt of some positions: 0 makes a position neither write nor decay the state.

    Attributes:
        value: the step, >= 0.
        positions: where; None: everywhere.

    Raises:
        InterventionError: a negative or non-finite step; features that are (head, state) pairs (a step belongs to a
            head).

    Example:
        >>> SetDelta(value=0.0, positions=[2, 3])
    """

    kind: ClassVar[str] = "SetDelta"

    value: float

    @field_validator("value", mode="plain")
    @classmethod
    def _value(cls, value: Any) -> float:
        step = as_number(value, "SetDelta.value")
        if step < 0:
            raise InterventionError(f"SetDelta.value must be a step >= 0, got {step}")
        return step


class ScaleFeatures(_AtPositions):
    """Multiply what the features give to y at some positions (0 silences them, 1 changes nothing).

    Attributes:
        factor: the multiplier.
        positions: targets at which it acts; None: everywhere.

    Raises:
        InterventionError: a factor that is not finite.

    Example:
        >>> ScaleFeatures(factor=0.0, features=[0, 5], positions=-1)
    """

    kind: ClassVar[str] = "ScaleFeatures"

    factor: float

    @field_validator("factor", mode="plain")
    @classmethod
    def _factor(cls, value: Any) -> float:
        return as_number(value, "ScaleFeatures.factor")


class EditAttention(_OfHeads):
    """Change single entries of the SSM attention matrix: y gains (M' - M) x.

    Attributes:
        edges: (target, source) pairs.
        value: what to put there.
        mode: "set" the entries to the value, "add" it, or "scale" the entries by it.

    Cost: one row of the matrix per target, O(L H N) each.

    Raises:
        InterventionError: an unknown mode; an edge whose source comes after its target (raised when it meets a prompt);
            features that are (head, state) pairs (an entry of the matrix belongs to a head).

    Example:
        >>> EditAttention(edges=[(7, 3)], value=0.0)            # the same as Knockout(edges=[(7, 3)])
    """

    kind: ClassVar[str] = "EditAttention"

    edges: Pairs
    value: float
    mode: str = "set"

    @field_validator("edges", mode="plain")
    @classmethod
    def _edges(cls, value: Any) -> Pairs | None:
        return _edges_of(cls.kind, value)

    @field_validator("value", mode="plain")
    @classmethod
    def _value(cls, value: Any) -> float:
        return as_number(value, "EditAttention.value")

    @field_validator("mode", mode="plain")
    @classmethod
    def _mode(cls, value: Any) -> str:
        if value not in ("set", "add", "scale"):
            raise InterventionError(f"EditAttention.mode must be 'set', 'add' or 'scale', got {describe(value)}")
        return str(value)

    @property
    def names_positions(self) -> bool:
        """Whether it is restricted to some positions: its edges are."""
        return True


KINDS: tuple[type[Intervention], ...] = (Knockout, PatchState, SetDelta, ScaleFeatures, EditAttention)
"""All that `Attachment.edit` knows how to put to work."""


def _edges_of(kind: str, value: Any) -> tuple[tuple[int, int], ...] | None:
    if value is None:
        return None
    edges = as_pairs(value, f"{kind}.edges", "(target, source)")
    if not edges:
        raise InterventionError(f"{kind}.edges is empty, so that nothing would happen; name pairs (target, source)")
    return edges
