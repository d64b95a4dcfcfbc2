"""Positions that users name, as columns of `input_ids`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ssm_interp.hooks.errors import InterventionError
from ssm_interp.hooks.interventions import FlatPositions, RowPositions


def position_mask(
    positions: FlatPositions | RowPositions | None, batch: int, length: int, what: str, mask: Tensor | None = None
) -> Tensor:
    """The named positions as a mask over a prompt of some length, `[b, t]`; None names all.

    Args:
        mask: 0 at padding, `[b, t]`. Negative positions count from each row's last token; without a mask, from the
            last column.

    Raises:
        InterventionError: a position outside the prompt or inside padding, or another number of rows.
    """
    if positions is None:
        return torch.ones(batch, length, dtype=torch.bool)
    chosen = torch.zeros(batch, length, dtype=torch.bool)
    if positions and isinstance(positions[0], tuple):
        ends, kept = _ends(mask, batch, length)
        for row, named in enumerate(_rows(positions, batch, what)):
            for position in named:
                chosen[row, _column(position, row, ends[row], length, what, kept)] = True
        return chosen
    for position in cast(FlatPositions, positions):
        chosen[torch.arange(batch), column_of(position, batch, length, what, mask)] = True
    return chosen


def column_of(position: int, batch: int, length: int, what: str, mask: Tensor | None = None) -> Tensor:
    """The column of one position in each row, `[b]`; arguments and errors as for `position_mask`."""
    rows = 1 if mask is None else batch  # without a mask all are alike
    ends, kept = _ends(mask, rows, length)
    return torch.tensor([_column(position, row, ends[row], length, what, kept) for row in range(rows)]).expand(batch)


def right_padded(mask: Tensor | None) -> list[int]:
    """The rows of a mask `[b, t]` whose last column is padding."""
    return [] if mask is None or mask.ndim != 2 else (mask[:, -1] == 0).nonzero()[:, 0].tolist()


def _ends(mask: Tensor | None, batch: int, length: int) -> tuple[list[int], list[list[bool]] | None]:
    """How many columns each row has up to its last token, and which of its columns are tokens."""
    if mask is None:
        return [length] * batch, None
    kept = mask.bool().cpu()[torch.arange(batch) % len(mask)]
    last = torch.where(kept, torch.arange(1, kept.shape[1] + 1), 0).amax(1)
    return torch.where(last == 0, length, last).tolist(), kept.tolist()


def _column(position: int, row: int, end: int, length: int, what: str, kept: list[list[bool]] | None) -> int:
    column = position if position >= 0 else end + position
    if not 0 <= column < length:
        tokens = f", {end} up to the last token of row {row}" if end < length else ""
        raise InterventionError(
            f"{what} names position {position}, but the prompt has {length} positions{tokens} "
            f"(0 to {length - 1}, or -{end} to -1)"
        )
    if kept is not None and not kept[row][column]:
        raise InterventionError(
            f"{what} names position {position} of row {row}, which is padding; positions are columns of input_ids"
        )
    return column


def _rows(positions: RowPositions, batch: int, what: str) -> Sequence[FlatPositions]:
    if len(positions) != batch:
        raise InterventionError(
            f"{what} names the positions of {len(positions)} rows, but the batch has {batch}; "
            "give one sequence per row, or one flat sequence for all"
        )
    return positions
