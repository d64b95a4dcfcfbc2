"""Many sets of knockouts on one batch, resolved: which positions, features and layers each of them is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ssm_interp.arguments import as_list
from ssm_interp.errors import InterventionError
from ssm_interp.hooks.edits.masks import Columns, naming, no_edge, reading
from ssm_interp.hooks.interventions import Knockout


@dataclass(frozen=True)
class Cell:
    """What one variant knocks out in one stream of one layer: indices into the tables of its plan."""

    sources: int
    targets: int
    features: int


@dataclass(frozen=True)
class Plan:
    """Variants (each a set of knockouts that act together) of a batch of n prompts of length t.

    Attributes:
        positions: table of position masks, bool `[n t]`.
        features: table of features, as a Knockout keeps them.
        cells: (stream, layer) -> variant -> what it knocks out there; those that knock out nothing are missing.
        variants: how many there are.
    """

    positions: list[Tensor]
    features: list[Any]
    cells: dict[tuple[str, int], dict[int, Cell]]
    variants: int

    def at(self, stream: str, layer: int) -> dict[int, Cell]:
        """What the variants knock out in a stream of a layer."""
        return self.cells.get((stream, layer), {})

    def narrow(self, rows: Tensor, columns: slice, variants: Sequence[int] | None = None) -> Plan:
        """The same for some prompts, a run of columns, and some variants; cells without an edge fall away."""
        positions = [mask[rows, columns] for mask in self.positions]
        part = replace(self, positions=positions)
        wanted = set(range(self.variants) if variants is None else variants)
        live = {cell: bool(part.reading(cell).any()) for cell in {c for f in self.cells.values() for c in f.values()}}
        cells = {
            at: {variant: cell for variant, cell in by_variant.items() if variant in wanted and live[cell]}
            for at, by_variant in self.cells.items()
        }
        return replace(part, cells=cells)

    def reading(self, cell: Cell) -> Tensor:
        """The targets that read one of the sources, bool `[n t]`: those with a source at or before them."""
        return reading(self.positions[cell.targets], self.positions[cell.sources])

    def is_named(self, cell: Cell) -> bool:
        """Whether some prompt has both sources and targets."""
        return bool((self.positions[cell.targets].any(1) & self.positions[cell.sources].any(1)).any())

    def first_layer(self, variant: int) -> int | None:
        """The first layer in which a variant knocks something out; None: it never does."""
        return min((layer for (_, layer), by_variant in self.cells.items() if variant in by_variant), default=None)

    def first_target(self, variant: int) -> int | None:
        """The first column, over all prompts, that a variant changes; None: it changes nothing."""
        cells = {by_variant[variant] for by_variant in self.cells.values() if variant in by_variant}
        return min((int(self.reading(cell).any(0).nonzero()[0, 0]) for cell in cells), default=None)


def resolve(
    variants: Sequence[Sequence[Knockout]],
    streams: Mapping[str, Sequence[int]],
    mask: Tensor,
    default: str,
    *,
    refuse: bool = True,
) -> Plan:
    """The plan of some variants.

    Args:
        variants: each the knockouts that act together.
        streams: "ssm" and "attention" -> the model's layers that have it.
        mask: 0 at padding, `[b t]`.
        default: the stream of a knockout that names none.
        refuse: edges of which not one exists.

    Raises:
        InterventionError: a knockout given as `edges`; two knockouts of one variant in one stream of one layer;
            positions outside the prompt, inside padding, or for another number of rows; edges of which not one
            exists, in any row and variant.
    """
    table = _Table(mask)
    cells: dict[tuple[str, int], dict[int, Cell]] = {}
    for number, knockouts in enumerate(variants):
        for knockout in knockouts:
            cell = table.cell(knockout)
            for stream in knockout.through or (default,):
                for layer in streams[stream] if knockout.layers is None else as_list(knockout.layers):
                    if layer not in streams[stream]:
                        continue
                    by_variant = cells.setdefault((stream, layer), {})
                    if number in by_variant:
                        raise InterventionError(
                            f"variant {number} has two knockouts at the {stream} of layer {layer}; give one knockout "
                            "that names all of its sources"
                        )
                    by_variant[number] = cell
    plan = Plan(table.masks, table.features, cells, len(variants))
    named = {cell for by_variant in cells.values() for cell in by_variant.values() if plan.is_named(cell)}
    if refuse and named and not any(plan.reading(cell).any() for cell in named):
        first = next(knockout for knockouts in variants for knockout in knockouts)
        raise InterventionError(no_edge(naming(first), mask.shape[1]))
    return plan


class _Table:
    """Position masks and features, each kept once."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask.cpu()
        self.masks: list[Tensor] = []
        self.features: list[Any] = []
        self._known: dict[Any, int] = {}
        self._cells: dict[Any, Cell] = {}

    def cell(self, knockout: Knockout) -> Cell:
        if knockout.edges is not None:
            raise InterventionError("a batched knockout is given by sources and targets, not by single edges")
        key = (knockout.sources, knockout.targets, knockout.features)
        if key not in self._cells:
            sources, targets = (self._positions(getattr(knockout, name), name) for name in ("sources", "targets"))
            if knockout.features not in self.features:
                self.features.append(knockout.features)
            self._cells[key] = Cell(sources, targets, self.features.index(knockout.features))
        return self._cells[key]

    def _positions(self, positions: Any, name: str) -> int:
        if positions not in self._known:
            columns = Columns(len(self._mask), self._mask.shape[1], self._mask)
            self.masks.append(columns.positions(positions, f"Knockout.{name}") & self._mask.bool())
            self._known[positions] = len(self.masks) - 1
        return self._known[positions]
