"""What users give, normalised in one place: indices, positions, features, streams, numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import index
from typing import Any, SupportsFloat, TypeAlias, TypeGuard

from ssm_interp.errors import InterventionError
from ssm_interp.reprs import describe
from ssm_interp.words import STREAMS, Role

Indices: TypeAlias = int | Iterable[int]
Positions: TypeAlias = int | Role | Iterable[int | Role] | Iterable[Iterable[int]]
"""Positions of every row (integers, roles), or one sequence of integers per row."""
Features: TypeAlias = int | str | Iterable[int] | Iterable[tuple[int, int]]
"""Heads (in Mamba-1 channels), (head, state dimension) pairs, or the name of a feature group."""
Pairs: TypeAlias = Iterable[tuple[int, int]]
Streams: TypeAlias = str | Iterable[str]

FlatPositions: TypeAlias = tuple[int | Role, ...]
RowPositions: TypeAlias = tuple[tuple[int, ...], ...]


def as_index(value: Any) -> int | None:
    """An integer of Python, numpy or torch, as Python's; None for anything else, True and False included."""
    try:
        value = value.tolist() if hasattr(value, "tolist") else value
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None


def as_indices(values: Any, name: str) -> tuple[int, ...] | None:
    """One index or a sequence of them (Python's, numpy's or torch's) as a tuple; None stays None.

    Raises:
        InterventionError: anything else.
    """
    if values is None:
        return None
    if (alone := as_index(values)) is not None:
        return (alone,)
    given = [as_index(value) for value in as_list(values)]
    if None in given:
        raise InterventionError(f"{name} must be an integer or a sequence of integers, got {describe(values)}")
    return tuple(value for value in given if value is not None)


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
    return as_pairs(values, name, "(head, state dimension)") if all(map(is_row, rows)) else as_indices(values, name)


def as_positions(values: Any, name: str) -> FlatPositions | RowPositions | None:
    """One position or role, a sequence of them, or a sequence of positions per row, as tuples; None stays None.

    Raises:
        InterventionError: none; anything else.
    """
    if values is None or isinstance(values, str):
        return values if values is None else (values,)
    rows = as_list(values)
    if not rows:
        raise InterventionError(f"{name} is empty, so that nothing would happen; leave it out for every position")
    try:
        if all(map(is_row, rows)):
            return tuple(as_indices(row, name) or () for row in rows)
    except InterventionError:
        rows = [None]
    given = [row if isinstance(row, str) else as_index(row) for row in rows]
    if None in given:
        raise InterventionError(
            f"{name} must be an integer or a role, a sequence of them, or one sequence of integers per row, got "
            f"{describe(values)}"
        )
    return tuple(position for position in given if position is not None)


def as_pairs(values: Any, name: str, what: str) -> tuple[tuple[int, int], ...]:
    """Pairs of integers as tuples.

    Raises:
        InterventionError: anything else.
    """
    given = [[as_index(value) for value in as_list(row)] for row in as_list(values)]
    if any(len(pair) != 2 or None in pair for pair in given):
        raise InterventionError(f"{name} must be pairs {what} of integers, got {describe(values)}")
    return tuple((first, second) for first, second in given if first is not None and second is not None)


def as_streams(streams: Any, name: str = "through") -> tuple[str, ...] | None:
    """One stream or a sequence of them as a tuple, in the order of STREAMS; None stays None.

    Raises:
        InterventionError: anything else.
    """
    if streams is None:
        return None
    given = as_list(streams)
    if not given or any(stream not in STREAMS for stream in given):
        there = ", ".join(map(repr, STREAMS))
        raise InterventionError(f"{name} must name streams, out of {there}; got {describe(streams)}")
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


def as_list(values: Any) -> list[Any]:
    """What an array or an iterable holds; anything else, a text too, stands alone."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if is_row(values) else [values]


def is_row(value: Any) -> TypeGuard[Iterable[Any]]:
    """Whether a value holds others: no text does."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes)


def is_per_row(positions: FlatPositions | RowPositions) -> TypeGuard[RowPositions]:
    """Whether positions are those of each row, not the same in all."""
    return bool(positions) and isinstance(positions[0], tuple)
