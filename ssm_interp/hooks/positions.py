"""Positions that users name, as columns of `input_ids`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ssm_interp.errors import InterventionError
from ssm_interp.hooks.callers import check_guidance
from ssm_interp.hooks.interventions import FlatPositions, RowPositions


def position_mask(
    positions: FlatPositions | RowPositions | None, batch: int, length: int, what: str, mask: Tensor | None = None
) -> Tensor:
    """The named positions as a mask over a prompt of some length, `[b, t]`; None names all.

    Args:
        mask: 0 at padding, `[b, t]`. Negative positions count from each row's last token; without a mask, from the
            last column.

    Raises:
        InterventionError: a position outside the prompt or inside padding, or another number of rows; the second prompt
            of guidance.
    """
    if positions is None:
        return torch.ones(batch, length, dtype=torch.bool)
    check_guidance(what)
    chosen = torch.zeros(batch, length, dtype=torch.bool)
    ends = _ends(mask, batch, length)
    if positions and isinstance(positions[0], tuple):
        rows = list(_rows(positions, batch, what))
    else:
        rows = [cast(FlatPositions, positions)]
        if mask is None:  # every row alike
            chosen[:, _columns(rows[0], 0, ends, length, what, None)] = True
            return chosen
        rows = rows * batch
    for row, named in enumerate(rows):
        chosen[row, _columns(named, row, ends, length, what, mask)] = True
    return chosen


def column_of(position: int, batch: int, length: int, what: str, mask: Tensor | None = None) -> Tensor:
    """The column of one position in each row, `[b]`; arguments and errors as for `position_mask`."""
    check_guidance(what)
    ends = _ends(mask, batch, length)
    if mask is None:
        return _columns((position,), 0, ends, length, what, None).expand(batch)
    return torch.cat([_columns((position,), row, ends, length, what, mask) for row in range(batch)])


def right_padded(mask: Tensor | None) -> list[int]:
    """The rows of a mask `[b, t]` whose last column is padding."""
    return [] if mask is None or mask.ndim != 2 else (mask[:, -1] == 0).nonzero()[:, 0].tolist()


def _ends(mask: Tensor | None, batch: int, length: int) -> list[int]:
    """How many columns each row has up to its last token."""
    if mask is None:
        return [length] * batch
    kept = mask.bool().cpu()
    last = torch.where(kept, torch.arange(1, kept.shape[1] + 1), 0).amax(1)
    ends: list[int] = torch.where(last == 0, length, last)[torch.arange(batch) % len(mask)].tolist()
    return ends


def _columns(
    positions: FlatPositions, row: int, ends: list[int], length: int, what: str, mask: Tensor | None
) -> Tensor:
    """The columns of some positions of one row."""
    named, end = torch.tensor(positions, dtype=torch.long), ends[row]
    columns = torch.where(named < 0, end + named, named)
    outside = (columns < 0) | (columns >= length)
    if outside.any():
        tokens = f", {end} up to the last token of row {row}" if end < length else ""
        raise InterventionError(
            f"{what} names position {int(named[outside][0])}, but the prompt has {length} positions{tokens} "
            f"(0 to {length - 1}, or -{end} to -1)"
        )
    if mask is not None and not (kept := mask[row % len(mask)].bool().cpu()[columns]).all():
        raise InterventionError(
            f"{what} names position {int(named[~kept][0])} of row {row}, which is padding; "
            "positions are columns of input_ids"
        )
    return columns


def _rows(positions: RowPositions, batch: int, what: str) -> Sequence[FlatPositions]:
    if len(positions) != batch:
        raise InterventionError(
            f"{what} names the positions of {len(positions)} rows, but the batch has {batch}; "
            "give one sequence per row, or one flat sequence for all"
        )
    return positions
