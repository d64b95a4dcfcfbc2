"""Interventions that are held on while a model is swept: in the clean run and under every knockout alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from ssm_interp.experiments.declared import KeyedError
from ssm_interp.experiments.mistakes import did_you_mean, either, mistyped_kind, written
from ssm_interp.experiments.values import check_share

if TYPE_CHECKING:
    from ssm_interp.hooks import Intervention

KINDS = ("Knockout", "ScaleFeatures", "SetDelta", "EditAttention")
"""Those that mean the same in every prompt. A state that is patched in is of one prompt."""
POSITIONS = ("positions", "sources", "targets", "edges")


def _held(value: Any) -> Any:
    """An intervention, which may be given as data (see `Intervention.from_dict`); features may be the name of a group.

    Raises:
        KeyedError: no such kind or field, a value that the field does not take, a position that prompts of other
            lengths do not share.
    """
    from ssm_interp.hooks import Intervention, InterventionError

    if isinstance(value, Intervention):
        given: Mapping[str, Any] = value.to_dict()
    elif isinstance(value, Mapping):
        given = value
    else:
        raise ValueError(f"it should be a table with a kind, such as ScaleFeatures, got {written(value)}")
    kind = given.get("kind")
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS)
        wrong = f"there is no {written(kind)} to hold on: {hint}"
        key: tuple[str, ...] = ("kind",)
        if "kind" not in given:
            key = mistyped_kind(given)
            wrong = "there is no such key: did you mean 'kind'? " if key else "its kind is missing: "
        raise KeyedError(key, f"{wrong}it is {either(map(written, KINDS))}")
    fields = _fields(kind)
    if unknown := [name for name in given if name not in fields]:
        hint = did_you_mean(unknown[0], fields)
        raise KeyedError((unknown[0],), f"there is no such key: {hint}{kind} has {', '.join(fields)}")
    try:
        edit = Intervention.from_dict(dict(given))
        if isinstance(edit.features, str):
            check_share(edit.features)
    except InterventionError as error:
        raise KeyedError(_blamed(given, str(error)), str(error)) from None
    except ValueError as error:
        raise KeyedError(("features",), str(error)) from None
    _check_positions(edit)
    return edit


def _fields(kind: str) -> tuple[str, ...]:
    from ssm_interp import hooks

    return ("kind", *getattr(hooks, kind).model_fields)


def _blamed(given: Mapping[str, Any], message: str) -> tuple[str, ...]:
    """The key that a message is about: the first that it names."""
    named = {name: re.search(rf"\b{re.escape(str(name))}\b", message) for name in given if name != "kind"}
    starts = {name: match.start() for name, match in named.items() if match}
    return (min(starts, key=starts.__getitem__),) if starts else ()


def _check_positions(edit: Intervention) -> None:
    for name in POSITIONS:
        for position in _flat(getattr(edit, name, None)):
            if isinstance(position, str) or position >= 0:
                message = (
                    f"{written(position)} is not at one place in prompts of several lengths; count back from the last "
                    "token, which is -1"
                )
                raise KeyedError((name,), message)


def _flat(positions: Any) -> Iterator[int | str]:
    if isinstance(positions, tuple):
        for position in positions:
            yield from _flat(position)
    elif positions is not None:
        yield positions


def described(edit: Intervention) -> str:
    """An intervention in the words of tables and pictures.

    Example:
        >>> from ssm_interp import SetDelta
        >>> described(SetDelta(value=0.0, layers=[0, 1]))
        'SetDelta layers 0 1 value 0.0'
    """
    kind, *fields = edit.to_dict().items()
    words = [str(kind[1])]
    for name, value in fields:
        items = value if isinstance(value, list) else [value]
        words += [name, *(":".join(map(str, item)) if isinstance(item, list) else str(item) for item in items)]
    return " ".join(words)


def under(held: Sequence[Intervention]) -> list[str]:
    """What is held on, in the words that stand behind a model's name."""
    return [f"under {described(edit)}" for edit in held]


def _as_data(edit: Intervention) -> dict[str, Any]:
    return edit.to_dict()


if TYPE_CHECKING:
    Held = Intervention
else:
    Held = Annotated[Any, PlainValidator(_held), PlainSerializer(_as_data)]
