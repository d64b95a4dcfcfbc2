"""What all interventions are: frozen data with layers, features, and positions or roles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from torch import Tensor

from ssm_interp.arguments import (
    Features,
    Indices,
    RowPositions,
    as_features,
    as_indices,
    as_list,
    is_per_row,
    is_row,
)
from ssm_interp.errors import InterventionError
from ssm_interp.reprs import describe

Kind = TypeVar("Kind", bound="Intervention")


@runtime_checkable
class HasRoles(Protocol):
    """A batch of prompts, as far as it says where roles are: `ssm_interp.prompts.Batch` is one."""

    def positions(self, role: str) -> Sequence[Sequence[int]]:
        """The columns of `input_ids` that play a role, one list per row."""


class Intervention(BaseModel):
    """One edit of the SSM layers, as data: frozen, comparable, and checked when it is made.

    Positions are columns of `input_ids`; negative ones count back from each row's last token, as a mask tells it. The
    prompt is the first call on a cache. One integer or a flat sequence names the same positions in every row of the
    batch, a sequence of sequences those of each row (an empty one: none); `[3, 4]` is both positions in every row,
    `[[3], [4]]` is 3 in the first row and 4 in the second. None means every position, generated ones included.

    A position may also be a *role*, such as "subject_last", or several. Only a batch of prompts knows where they are:
    `ssm.edit(..., batch=batch)` and `answers` ask theirs, `resolve(batch)` gives the same intervention with positions.

    A feature is a head (in Mamba-1 a channel), given by its index, or a (head, state dimension) pair. The name of a
    feature group stands for the features that `feature_groups` gives it, where groups are asked for: in sweeps,
    circuits and recipes.

    Attributes:
        layers: model layer indices; None: every SSM layer.
        features: one head or a sequence of them, or a sequence of (head, state dimension) pairs: `[(0, 5)]` is one
            pair, `(0, 5)` two heads. None: all.

    Every field is kept as tuples, whatever sequence was given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    kind: ClassVar[str] = "Intervention"
    position_fields: ClassVar[tuple[str, ...]] = ()
    """The fields that are positions."""

    layers: Indices | None = None
    features: Features | None = None

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise InterventionError(_explained(type(self), error)) from None

    @field_validator("layers", mode="plain")
    @classmethod
    def _layers(cls, value: Any) -> tuple[int, ...] | None:
        layers = as_indices(value, f"{cls.kind}.layers")
        if layers == ():
            raise InterventionError(
                f"{cls.kind}.layers is empty, so that nothing would happen; leave it out for all layers"
            )
        return layers

    @field_validator("features", mode="plain")
    @classmethod
    def _features(cls, value: Any) -> Features | None:
        return value if isinstance(value, str) else as_features(value, f"{cls.kind}.features")

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that it names, each once."""
        positions = (position for name in self.position_fields for position in getattr(self, name) or ())
        return tuple(dict.fromkeys(position for position in positions if isinstance(position, str)))

    @property
    def named_parts(self) -> tuple[Any, ...]:
        """All that it names of a model: what `Attachment.check` looks at."""
        return self.kind, self.layers, self.features, getattr(self, "through", None)

    @property
    def names_positions(self) -> bool:
        """Whether it is restricted to some positions."""
        return any(getattr(self, name) is not None for name in self.position_fields)

    def acts_at(self, layer: int) -> bool:
        """Whether a layer is among its layers."""
        return self.layers is None or layer in as_list(self.layers)

    def resolve(self: Kind, batch: HasRoles) -> Kind:
        """The same with the columns of a batch in place of roles; itself where it names none.

        Args:
            batch: prompts with roles, as `pad` gives them.

        Raises:
            PromptError: the batch knows no such role.

        Example:
            >>> Knockout(sources="subject", targets="last").resolve(batch).sources        # doctest: +SKIP
            ((3, 4), (5, 6))
        """
        if not self.roles:
            return self
        if not isinstance(batch, HasRoles):
            raise InterventionError(_no_batch(batch))
        return self.replace(**{name: _columns(getattr(self, name), batch) for name in self.position_fields})

    def replace(self: Kind, **changes: Any) -> Kind:
        """The same with other values of some fields, checked.

        Raises:
            InterventionError: a value that a field does not take.
        """
        return type(self)(**dict(self) | changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `{"kind": ..., field: value, ...}` without the fields that have their defaults."""
        given = {name: value for name, value in self if value is not type(self).model_fields[name].default}
        return {"kind": self.kind} | {name: _listed(value) for name, value in given.items()}

    @staticmethod
    def from_dict(data: Any) -> Intervention:
        """The intervention that `to_dict` described.

        Raises:
            InterventionError: an unknown kind, an unknown or missing field, or a value that the field does not take.
        """
        if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
            raise InterventionError(f"an intervention is a dict with a `kind`, such as Knockout, got {describe(data)}")
        given = {str(name): value for name, value in data.items()}
        kind = given.pop("kind")
        kinds = {
            subclass.kind: subclass for subclass in _subclasses(Intervention) if subclass.kind != Intervention.kind
        }
        if kind not in kinds:
            raise InterventionError(f"unknown kind of intervention {describe(kind)}; there are {sorted(kinds)}")
        return kinds[kind](**given)

    def __setattr__(self, name: str, value: Any) -> None:
        raise InterventionError(f"a {self.kind} is frozen; intervention.replace({name}=...) gives another one")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return False
        return all(_same(mine, theirs) for (_, mine), (_, theirs) in zip(self, other, strict=True))

    def __repr__(self) -> str:
        given = {name: value for name, value in self if value is not type(self).model_fields[name].default}
        return f"{self.kind}({', '.join(f'{name}={describe(value)}' for name, value in given.items())})"

    __str__ = __repr__

    def __hash__(self) -> int:
        return hash((self.kind, *(value for _, value in self if not isinstance(value, Tensor))))


def _subclasses(kind: type[Intervention]) -> Iterator[type[Intervention]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _columns(positions: Any, batch: HasRoles) -> RowPositions | Any:
    """Positions with the columns of a batch in place of roles, row by row."""
    if positions is None or is_per_row(positions) or not any(isinstance(position, str) for position in positions):
        return positions
    named = [position for position in positions if isinstance(position, int)]
    by_role = [batch.positions(role) for role in positions if isinstance(role, str)]
    if not all(is_row(rows) and all(map(is_row, rows)) for rows in by_role):
        raise InterventionError(_no_batch(batch))
    rows = zip(*by_role, strict=True)
    return tuple(tuple(dict.fromkeys([*named, *(column for part in row for column in part)])) for row in rows)


def _no_batch(given: Any) -> str:
    return (
        "roles are resolved by a batch of prompts, as pad([tokenize(prompt, tokenizer), ...]) gives it, got "
        f"{describe(given)}"
    )


def _explained(kind: type[Intervention], error: ValidationError) -> str:
    """What is wrong, as one sentence each."""

    def sentences() -> Iterator[str]:
        problems = error.errors()
        fields = sorted(kind.model_fields)
        if unknown := [str(problem["loc"][-1]) for problem in problems if problem["type"] == "extra_forbidden"]:
            yield f"{kind.kind} has no field {sorted(unknown)}; it has {fields}"
        if missing := [repr(problem["loc"][-1]) for problem in problems if problem["type"] == "missing"]:
            yield f"{kind.kind}: missing {', '.join(missing)}"
        yield from (str(problem["ctx"]["error"]) for problem in problems if "error" in problem.get("ctx", {}))

    return "; ".join(sentences())


def _listed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        return mine is theirs or (mine.shape == theirs.shape and bool((mine.cpu() == theirs.cpu()).all()))
    return bool(mine == theirs)
