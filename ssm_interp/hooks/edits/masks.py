"""What an intervention names, in one batch, as masks: where positions, edges and features become tensors.

An edge set is a list of products targets x sources, so that no mask of targets x sources is written out unless a stream
(softmax attention) needs one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from ssm_interp.arguments import FlatPositions, Positions, RowPositions, as_positions, is_per_row
from ssm_interp.errors import InterventionError
from ssm_interp.hooks.interventions import Knockout
from ssm_interp.hooks.seam.callers import check_guidance
from ssm_interp.scan.knockout import products

Product = tuple[Tensor, Tensor]
"""Targets and sources, bool `[b t]` each: every edge between them; those from a later source do not exist."""


@dataclass(frozen=True)
class Columns:
    """The columns of a prompt, which positions count.

    Attributes:
        batch: rows.
        length: columns.
        mask: 0 at padding, `[b t]`; None: there is none. Negative positions count from each row's last token.
    """

    batch: int
    length: int
    mask: Tensor | None = None

    def positions(self, positions: Positions | None, what: str) -> Tensor:
        """Positions as a mask, `[b t]`; None names all.

        Raises:
            InterventionError: a position outside the prompt or inside padding; another number of rows; a role, which a
                batch resolves; the second prompt of guidance.
        """
        named = as_positions(positions, what)
        if named is None:
            return torch.ones(self.batch, self.length, dtype=torch.bool)
        check_guidance(what)
        chosen = torch.zeros(self.batch, self.length, dtype=torch.bool)
        ends = self._ends()
        if is_per_row(named):
            rows: Sequence[FlatPositions] = self._rows(named, what)
        elif self.mask is None:  # every row alike
            chosen[:, self._columns(cast(FlatPositions, named), 0, ends, what)] = True
            return chosen
        else:
            rows = [cast(FlatPositions, named)] * self.batch
        for row, those in enumerate(rows):
            chosen[row, self._columns(those, row, ends, what)] = True
        return chosen

    def column(self, position: int, what: str) -> Tensor:
        """The column of one position in each row, `[b]`; errors as for `positions`."""
        check_guidance(what)
        ends = self._ends()
        if self.mask is None:
            return self._columns((position,), 0, ends, what).expand(self.batch)
        return torch.cat([self._columns((position,), row, ends, what) for row in range(self.batch)])

    def edges(self, knockout: Knockout, *, refuse: bool = True) -> list[Product]:
        """The edges of a knockout in the prompt; a target is in one of the products.

        Args:
            refuse: edges of which none exists; else they are given all the same.

        Raises:
            InterventionError: a position that does not exist; edges of which none exists in any row.
        """
        what = naming(knockout)
        if knockout.edges is not None:
            return list(self._listed(tuple(knockout.edges), what, refuse))
        targets = self.positions(knockout.targets, "Knockout.targets")
        sources = self.positions(knockout.sources, "Knockout.sources")
        if refuse and (targets.any(1) & sources.any(1)).any() and not reading(targets, sources).any():
            raise InterventionError(no_edge(what, self.length))
        return [(targets, sources)]

    def edges_over(self, knockout: Knockout, length: int) -> list[Product]:
        """The same in a sequence of some length that began with this prompt: generated positions are among targets and
        sources that a knockout leaves open."""
        later, closed = length - self.length, knockout.edges is not None
        return [
            (
                pad(targets, (0, later), value=knockout.targets is None and not closed),
                pad(sources, (0, later), value=knockout.sources is None and not closed),
            )
            for targets, sources in self.edges(knockout)
        ]

    def _listed(self, edges: Sequence[tuple[int, int]], what: str, refuse: bool) -> Iterator[Product]:
        """Single edges as products; a square over the named columns alone says which belong together."""
        ends = [[self.column(position, "Knockout.edges") for position in pair] for pair in edges]
        named = torch.stack([torch.stack(pair) for pair in ends])  # e 2 b
        exist = (named[:, 0] >= named[:, 1]).any(1)
        if refuse and not exist.any():
            raise InterventionError(no_edge(what, self.length))
        if missing := int((~exist).sum()):
            warnings.warn(
                f"{missing} of the {len(edges)} edges of {what} do not exist: a source after its target", stacklevel=2
            )
        columns, entries = torch.unique(named, return_inverse=True)
        square = torch.zeros(self.batch, len(columns), len(columns), dtype=torch.bool)
        square[torch.arange(self.batch).expand(len(named), -1), entries[:, 0], entries[:, 1]] = True
        for chosen in products(square):
            masks = [torch.zeros(self.batch, self.length, dtype=torch.bool) for _ in chosen]
            for mask, part in zip(masks, chosen, strict=True):
                mask[:, columns] = part
            yield masks[0], masks[1]

    def _ends(self) -> list[int]:
        """How many columns each row has up to its last token."""
        if self.mask is None:
            return [self.length] * self.batch
        ends: list[int] = (1 + last_columns(self.mask.cpu()))[torch.arange(self.batch) % len(self.mask)].tolist()
        return ends

    def _columns(self, positions: FlatPositions, row: int, ends: list[int], what: str) -> Tensor:
        """The columns of some positions of one row."""
        if roles := [position for position in positions if isinstance(position, str)]:
            raise InterventionError(
                f"{what} names the role {roles[0]!r}, and only a batch of prompts knows where that is: give it along, "
                "as in ssm.edit(..., batch=batch), or take intervention.resolve(batch)"
            )
        named, end, length = torch.tensor(positions, dtype=torch.long), ends[row], self.length
        columns = torch.where(named < 0, end + named, named)
        outside = (columns < 0) | (columns >= length)
        if outside.any():
            tokens = f", {end} up to the last token of row {row}" if end < length else ""
            raise InterventionError(
                f"{what} names position {int(named[outside][0])}, but the prompt has {length} positions{tokens} "
                f"(0 to {length - 1}, or -{end} to -1)"
            )
        if self.mask is not None and not (kept := self.mask[row % len(self.mask)].bool().cpu()[columns]).all():
            raise InterventionError(
                f"{what} names position {int(named[~kept][0])} of row {row}, which is padding; "
                "positions are columns of input_ids"
            )
        return columns

    def _rows(self, positions: RowPositions, what: str) -> RowPositions:
        if len(positions) != self.batch:
            raise InterventionError(
                f"{what} names the positions of {len(positions)} rows, but the batch has {self.batch}; "
                "give one sequence per row, or one flat sequence for all"
            )
        return positions


def reading(targets: Tensor, sources: Tensor) -> Tensor:
    """The targets that read one of the sources, bool `[b t]`: those with a source at or before them."""
    return targets & (sources.cumsum(1) > 0)


def naming(knockout: Knockout) -> str:
    """A knockout by the edges that it names."""
    given = {name: getattr(knockout, name) for name in ("edges", "sources", "targets")}
    return f"Knockout({', '.join(f'{name}={value!r:.100}' for name, value in given.items() if value is not None)})"


def no_edge(what: str, length: int) -> str:
    """What to say of edges of which none exists."""
    return (
        f"none of the edges of {what} exists in a prompt of {length} positions: a target reads the sources at or "
        "before it alone. Are sources and targets swapped? An edge is (target, source)"
    )


def as_matrix(targets: Tensor, sources: Tensor) -> Tensor:
    """A product written out, bool `[b t s]`."""
    return rearrange(targets, "b t -> b t 1") & rearrange(sources, "b s -> b 1 s")


def as_taps(targets: Tensor, sources: Tensor, start: int, taps: int) -> Tensor:
    """The taps of a convolution by which targets, `[b t]` from column `start` on, read sources, `[b s]` from column 0
    on: bool `[k b t]`, whether t reads from so many positions before it."""
    t, padded = targets.shape[1], pad(sources, (taps - 1, 0))
    return torch.stack([targets & padded[:, start + taps - 1 - j :][:, :t] for j in range(taps)])


def last_columns(mask: Tensor) -> Tensor:
    """The column of each row's last token in a mask `[b t]`, `[b]`; of a row of padding the last column."""
    return mask.shape[1] - 1 - mask.flip(1).bool().int().argmax(1)


def right_padded(mask: Tensor | None) -> list[int]:
    """The rows of a mask `[b, t]` whose last column is padding."""
    return [] if mask is None or mask.ndim != 2 else (mask[:, -1] == 0).nonzero()[:, 0].tolist()


def feature_mask(features: object, heads: int, state_size: int, device: torch.device | None = None) -> Tensor:
    """Features as a mask: `[h 1]` for heads or `[h n]` for (head, state dimension) pairs; None names all.

    Args:
        features: as an intervention keeps them: indices, pairs, or None.
    """
    named = features if isinstance(features, tuple) else ()
    if named and isinstance(named[0], tuple):
        chosen = torch.zeros(heads, state_size, dtype=torch.bool)
        chosen[tuple(torch.tensor(named).unbind(1))] = True
    else:
        chosen = torch.full((heads, 1), features is None)
        chosen[list(named)] = True
    return chosen.to(device)


def attention_heads(features: object, heads: int) -> Tensor:
    """The heads of softmax attention that a knockout is restricted to, bool `[h 1 1]`.

    Raises:
        InterventionError: a head that there is not, or a (head, state dimension) pair.
    """
    for feature in features if isinstance(features, tuple) else ():
        if isinstance(feature, tuple) or not 0 <= feature < heads:
            raise InterventionError(
                f"Knockout.features names {feature}, but in softmax attention a feature is a head, 0 to {heads - 1}"
            )
    return rearrange(feature_mask(features, heads, 1), "h 1 -> h 1 1")
