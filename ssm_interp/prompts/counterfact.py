"""The layout of the CounterFact tracing data set, and how its rows are numbered in the knockout literature."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssm_interp.errors import PromptError

NAME = "counterfact"
HUB_NAME = "NeelNanda/counterfact-tracing"
ROWS = 21_919
SHUFFLE_SEED = 42
COLUMNS = frozenset(
    {
        "relation",
        "relation_prefix",
        "relation_suffix",
        "prompt",
        "relation_id",
        "target_false_id",
        "target_true_id",
        "target_true",
        "target_false",
        "subject",
    }
)


def hub_row(original_idx: int) -> int:
    """The row of the hub's data set that the published code calls `original_idx`: it numbers the shuffled rows.

    Raises:
        PromptError: not in 0 .. 21918.

    Source: `datasets.Dataset.shuffle(seed=42)` is NumPy's permutation of the 21,919 rows.

    Example:
        >>> hub_row(13190)
        7733
    """
    _check(original_idx, "original_idx")
    return int(_permutation()[original_idx])


def original_idx(hub_row: int) -> int:
    """The `original_idx` of a row of the hub's data set: the inverse of `hub_row`.

    Raises:
        PromptError: not in 0 .. 21918.

    Example:
        >>> original_idx(7733)
        13190
    """
    _check(hub_row, "row")
    return int(_inverse()[hub_row])


def as_prompt(row: Mapping[str, Any], number: int, rows: int) -> dict[str, Any]:
    """The columns of a prompt from those of this layout, without the spaces that stand before the layout's values.

    Args:
        row: its columns, by name.
        number: of the row, from 0.
        rows: how many there are. The id is the `original_idx` where the row has one or all of the data set is there,
            else the number.
    """
    number_of_id = original_idx(number) if rows == ROWS else number
    return {
        "text": row["prompt"],
        "subject": _stripped(row["subject"]),
        "answer": _stripped(row["target_true"]),
        "relation": row["relation"],
        "id": row.get("original_idx", number_of_id),
    }


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _check(number: int, name: str) -> None:
    if not 0 <= number < ROWS:
        raise PromptError(f"there is no {name} {number} in {HUB_NAME}: its {ROWS} rows are numbered from 0")


@cache
def _permutation() -> NDArray[np.int64]:
    return np.random.default_rng(SHUFFLE_SEED).permutation(ROWS)


@cache
def _inverse() -> NDArray[np.int64]:
    return np.argsort(_permutation())
