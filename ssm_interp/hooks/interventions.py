"""Interventions as data: what to change, where. `Attachment.edit` puts them to work."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from operator import index
from typing import Any, ClassVar, SupportsFloat, TypeAlias

import torch
from torch import Tensor

from ssm_interp.errors import InterventionError
from ssm_interp.reprs import describe

FlatPositions: TypeAlias = tuple[int, ...]
RowPositions: TypeAlias = tuple[FlatPositions, ...]

# What may be given is wider than what is kept: every field is checked and turned into tuples when it is set.
Positions: TypeAlias = Any
"""An int, a sequence of ints, a sequence of such sequences (one per row), or None; kept as FlatPositions, RowPositions
or None."""
Indices: TypeAlias = Any
"""An int, a sequence of ints, or None; kept as a tuple or None."""
Features: TypeAlias = Any
"""A head, a sequence of heads, a sequence of (head, state dimension) pairs, or None; kept as a tuple or None."""
Pairs: TypeAlias = Any
"""A sequence of (target, source) pairs; kept as a tuple of tuples."""
Streams: TypeAlias = Any
"""One of STREAMS or a sequence of them, or None; kept as a tuple or None."""

STREAMS = ("ssm", "conv", "attention")


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Intervention:
    """One edit of the SSM layers, as data.

    Positions are columns of `input_ids`; negative ones count back from each row's last token, as a mask tells it. The
    prompt is the first call on a cache. One integer or a flat sequence names the same positions in every row of the
    batch, a sequence of sequences those of each row (an empty one: none); `[3, 4]` is both positions in every row,
    `[[3], [4]]` is 3 in the first row and 4 in the second. None means every position, generated ones included.

    A feature is a head (in Mamba-1 a channel), given by its index, or a (head, state dimension) pair.

    Attributes:
        layers: model layer indices; None: every SSM layer.
        features: one head or a sequence of them, or a sequence of (head, state dimension) pairs: `[(0, 5)]` is one
            pair, `(0, 5)` two heads. None: all.
    """

    layers: Indices = None
    features: Features = None
    kind: ClassVar[str] = "Intervention"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", as_indices(self.layers, f"{self.kind}.layers"))
        if not isinstance(self.features, str):  # the name of a feature group
            object.__setattr__(self, "features", as_features(self.features, f"{self.kind}.features"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `{"kind": ..., field: value, ...}` without the fields that have their defaults."""
        found: dict[str, Any] = {"kind": self.kind}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is MISSING or value is not field.default:
                found[field.name] = value.tolist() if isinstance(value, Tensor) else _listed(value)
        return found

    @staticmethod
    def from_dict(data: Any) -> Intervention:
        """The intervention that `to_dict` described.

        Raises:
            InterventionError: an unknown kind, an unknown or missing field, or a value that the field does not take.
        """
        if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
            raise InterventionError(f"an intervention is a dict with a `kind`, such as Knockout, got {describe(data)}")
        given = dict(data)
        kind = given.pop("kind", None)
        kinds = {subclass.kind: subclass for subclass in KINDS}
        if kind not in kinds:
            raise InterventionError(f"unknown kind of intervention {describe(kind)}; there are {sorted(kinds)}")
        known = {field.name for field in fields(kinds[kind])}
        if unknown := given.keys() - known:
            raise InterventionError(f"{kind} has no field {sorted(map(str, unknown))}; it has {sorted(known)}")
        try:
            return kinds[kind](**given)
        except TypeError as error:
            raise InterventionError(f"{kind}: {error}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervention) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        shown = (f"{name}={describe(value)}" for name, (value, default) in values.items() if value is not default)
        return f"{self.kind}({', '.join(shown)})"

    def __hash__(self) -> int:
        return hash((self.kind, self.layers, self.features))


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
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
            unknown stream.

    Example:
        >>> Knockout(sources=[2, 3], targets=-1, layers=range(3, 12))
        >>> Knockout(sources=[2, 3], targets=-1, through=("ssm", "attention"))               # both streams of a hybrid
        >>> Knockout(sources=[6, 7], targets=8, through=("ssm", "conv"))         # nothing leaks through the convolution
        >>> Knockout(sources=[[2, 3], [4]], targets=-1, features=[0, 5])     # two rows, each its own sources
    """

    sources: Positions = None
    targets: Positions = None
    edges: Pairs = None
    through: Streams = None
    kind: ClassVar[str] = "Knockout"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "through", as_streams(self.through))
        for name in ("sources", "targets"):
            object.__setattr__(self, name, _positions(getattr(self, name), self.kind, name))
        if self.edges is not None:
            if self.sources is not None or self.targets is not None:
                raise InterventionError("Knockout takes either `edges`, or `sources` and `targets`, not both")
            object.__setattr__(self, "edges", _pairs(self.edges, "Knockout.edges", "(target, source)"))


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class PatchState(Intervention):
    """Replace the state after a position, or after several; later positions, and the reading there, go on from it.

    Attributes:
        position: where: one integer or a sequence, the same in every row of the batch, or one sequence per row.
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

    position: Positions
    state: Any
    kind: ClassVar[str] = "PatchState"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "position", _positions(self.position, self.kind, "position"))
        if not self.position or set(self.position) == {()}:
            raise InterventionError(
                "PatchState.position must name a position: an integer, a sequence of integers (the same in every row), "
                "or one such sequence per row"
            )
        try:
            state = self.state if isinstance(self.state, Tensor) else torch.as_tensor(self.state, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise InterventionError(
                f"PatchState.state must be a number, or a tensor [h p n] or [b h p n], got {describe(self.state)}; of "
                'what `run` read at every position one is run["state", layer][:, position]'
            ) from None
        if state.ndim not in (0, 3, 4):
            raise InterventionError(f"PatchState.state must be a number, [h p n] or [b h p n], got {list(state.shape)}")
        if state.is_meta or state.is_complex() or torch.bool in (state.dtype, torch.as_tensor(self.state).dtype):
            raise InterventionError(f"PatchState.state must be real numbers, got {state.dtype} on {state.device.type}")
        if not state.isfinite().all():
            raise InterventionError("PatchState.state has entries that are not finite (nan or inf)")
        object.__setattr__(self, "state", state)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SetDelta(Intervention):
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

    value: Any
    positions: Positions = None
    kind: ClassVar[str] = "SetDelta"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "positions", _positions(self.positions, self.kind, "positions"))
        object.__setattr__(self, "value", as_number(self.value, "SetDelta.value"))
        if self.value < 0:
            raise InterventionError(f"SetDelta.value must be a step >= 0, got {self.value}")
        _only_heads(self)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ScaleFeatures(Intervention):
    """Multiply what the features give to y at some positions (0 silences them, 1 changes nothing).

    Attributes:
        factor: the multiplier.
        positions: targets at which it acts; None: everywhere.

    Raises:
        InterventionError: a factor that is not finite.

    Example:
        >>> ScaleFeatures(factor=0.0, features=[0, 5], positions=-1)
    """

    factor: Any
    positions: Positions = None
    kind: ClassVar[str] = "ScaleFeatures"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "positions", _positions(self.positions, self.kind, "positions"))
        object.__setattr__(self, "factor", as_number(self.factor, "ScaleFeatures.factor"))


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class EditAttention(Intervention):
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

    edges: Pairs
    value: Any
    mode: Any = "set"
    kind: ClassVar[str] = "EditAttention"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "edges", _pairs(self.edges, "EditAttention.edges", "(target, source)"))
        object.__setattr__(self, "value", as_number(self.value, "EditAttention.value"))
        if self.mode not in ("set", "add", "scale"):
            raise InterventionError(f"EditAttention.mode must be 'set', 'add' or 'scale', got {describe(self.mode)}")
        _only_heads(self)


KINDS = (Knockout, PatchState, SetDelta, ScaleFeatures, EditAttention)
"""All that `Attachment.edit` knows how to put to work."""


def as_streams(streams: Any) -> tuple[str, ...] | None:
    """One stream or a sequence of them as a tuple, in the order of STREAMS; None stays None.

    Raises:
        InterventionError: anything else.
    """
    if streams is None:
        return None
    given = as_list(streams)
    if not given or any(stream not in STREAMS for stream in given):
        there = ", ".join(map(repr, STREAMS))
        raise InterventionError(f"through must name streams, out of {there}; got {describe(streams)}")
    return tuple(stream for stream in STREAMS if stream in given)


def as_number(value: Any, name: str) -> float:
    """A finite number.

    Raises:
        InterventionError: anything else.
    """
    real = isinstance(value, SupportsFloat) and not isinstance(value, bool)
    try:
        number = float(value) if real else math.nan
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise InterventionError(f"{name} must be a finite number, got {describe(value)}")
    return number


def _only_heads(intervention: Intervention) -> None:
    if intervention.features and isinstance(intervention.features[0], tuple):
        raise InterventionError(f"{intervention.kind} acts on heads; it takes no (head, state) pairs as features")


def as_index(value: Any) -> int | None:
    """An integer of Python, numpy or torch, as Python's; None for anything else, True and False included."""
    try:
        value = value.tolist() if hasattr(value, "tolist") else value
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None


def as_indices(values: Any, name: str) -> FlatPositions | None:
    """One index or a sequence of them (Python's, numpy's or torch's) as a tuple; None stays None.

    Raises:
        InterventionError: anything else.
    """
    if values is None:
        return None
    if (alone := as_index(values)) is not None:
        return (alone,)
    found = [as_index(value) for value in as_list(values)]
    if None in found:
        raise InterventionError(f"{name} must be an integer or a sequence of integers, got {describe(values)}")
    return tuple(value for value in found if value is not None)


def as_features(values: Any, name: str) -> tuple[int, ...] | tuple[tuple[int, int], ...] | None:
    """One head, a sequence of heads, or a sequence of (head, state dimension) pairs, as a tuple; None stays None.

    Raises:
        InterventionError: none; anything else.
    """
    if values is None or as_index(values) is not None:
        return as_indices(values, name)
    rows = as_list(values)
    if not rows:
        raise InterventionError(f"{name} is empty; None means all features")
    return _pairs(values, name, "(head, state dimension)") if all(map(_is_row, rows)) else as_indices(values, name)


def as_list(values: Any) -> list[Any]:
    """What an array or an iterable holds; anything else, a text too, stands alone."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if _is_row(values) else [values]


def _is_row(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes)


def _positions(values: Any, kind: str, name: str) -> FlatPositions | RowPositions | None:
    what = f"{kind}.{name}"
    if values is None or as_index(values) is not None:
        return as_indices(values, what)
    rows = as_list(values)
    try:
        if rows and all(map(_is_row, rows)):
            return tuple(as_indices(row, what) or () for row in rows)
        return as_indices(rows, what)
    except InterventionError:
        raise InterventionError(
            f"{what} must be an integer, a sequence of integers, or one such sequence per row, got {describe(values)}"
        ) from None


def _pairs(values: Any, name: str, what: str) -> tuple[tuple[int, int], ...]:
    found = [[as_index(value) for value in as_list(row)] for row in as_list(values)]
    if any(len(pair) != 2 or None in pair for pair in found):
        raise InterventionError(f"{name} must be pairs {what} of integers, got {describe(values)}")
    return tuple((first, second) for first, second in found if first is not None and second is not None)


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value
