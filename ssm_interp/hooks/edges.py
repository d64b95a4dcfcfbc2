"""The edges of a knockout in a prompt, as products targets x sources: for every stream, the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ssm_interp.errors import InterventionError
from ssm_interp.hooks.interventions import Knockout
from ssm_interp.hooks.positions import column_of, position_mask
from ssm_interp.scan.knockout import products

Product = tuple[Tensor, Tensor]


def edges_of(edit: Knockout, batch: int, length: int, mask: Tensor | None) -> list[Product]:
    """The edges of a knockout in a prompt.

    Args:
        mask: 0 at padding, `[b t]`; None: there is none.

    Returns:
        Targets and sources, bool `[b t]` each; a target is in one of the products.

    Raises:
        InterventionError: a position that does not exist; edges of which none exists in any row.
    """
    what = naming(edit)
    if edit.edges is not None:
        return list(_listed(edit.edges, batch, length, mask, what))
    targets, sources = (
        position_mask(getattr(edit, name), batch, length, f"Knockout.{name}", mask) for name in ("targets", "sources")
    )
    if (targets.any(1) & sources.any(1)).any() and not reading(targets, sources).any():
        raise InterventionError(no_edge(what, length))
    return [(targets, sources)]


def no_edge(what: str, length: int) -> str:
    """What to say of edges of which none exists."""
    return (
        f"none of the edges of {what} exists in a prompt of {length} positions: a target reads the sources at or "
        "before it alone. Are sources and targets swapped? An edge is (target, source)"
    )


def reading(targets: Tensor, sources: Tensor) -> Tensor:
    """The targets that read one of the sources, bool `[b t]`: those with a source at or before them."""
    return targets & (sources.cumsum(1) > 0)


def _listed(
    edges: Sequence[tuple[int, int]], batch: int, length: int, mask: Tensor | None, what: str
) -> Iterator[Product]:
    """Single edges as products; a square over the named columns alone says which belong together."""
    if not edges:
        return
    ends = [[column_of(position, batch, length, "Knockout.edges", mask) for position in pair] for pair in edges]
    named = torch.stack([torch.stack(pair) for pair in ends])  # e 2 b
    exist = (named[:, 0] >= named[:, 1]).any(1)
    if not exist.any():
        raise InterventionError(no_edge(what, length))
    if missing := int((~exist).sum()):
        warnings.warn(
            f"{missing} of the {len(edges)} edges of {what} do not exist: a source after its target", stacklevel=2
        )
    columns, places = torch.unique(named, return_inverse=True)
    square = torch.zeros(batch, len(columns), len(columns), dtype=torch.bool)
    square[torch.arange(batch).expand(len(named), -1), places[:, 0], places[:, 1]] = True
    for chosen in products(square):
        masks = [torch.zeros(batch, length, dtype=torch.bool) for _ in chosen]
        for one, part in zip(masks, chosen, strict=True):
            one[:, columns] = part
        yield masks[0], masks[1]


def naming(edit: Knockout) -> str:
    """A knockout by the edges that it names."""
    given = {name: getattr(edit, name) for name in ("edges", "sources", "targets")}
    return f"Knockout({', '.join(f'{name}={value!r:.100}' for name, value in given.items() if value is not None)})"
