"""Logits under variants by full forwards: sets of knockouts side by side in one batch, anything else one by one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssm_interp.arguments import RowPositions, as_list
from ssm_interp.hooks.attachment import Attachment
from ssm_interp.hooks.edits.masks import Columns, Product, last_columns, reading
from ssm_interp.hooks.intervention import Intervention
from ssm_interp.hooks.interventions import Knockout
from ssm_interp.hooks.rows.metrics import Positions

MOST_LOGITS = 2**26  # numbers that the logits of one forward may be, where they are kept at every position


def logits_of_text(
    ssm: Attachment,
    inputs: Mapping[str, Any],
    mask: Int[Tensor, "b t"] | Bool[Tensor, "b t"],
    positions: Positions = "last",
    keep: int = 0,
) -> Float[Tensor, "b *t v"]:
    """The logits of one forward: those at each row's last token, `[b v]`, or at all positions.

    Args:
        inputs: what the model is called with, `input_ids` among it.
        mask: 0 at padding, on the left or on the right.
        positions: "last" or "all".
        keep: of all positions only so many last columns, where the model can leave out the others; 0: all.
    """
    takes = inspect.signature(ssm.model.forward).parameters
    options: dict[str, Any] = {"use_cache": False}
    if "position_ids" in takes and inputs.get("position_ids") is None and not mask.all():
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).to(inputs["input_ids"].device)
    ends = last_columns(mask)
    at_the_end = bool((ends == mask.shape[1] - 1).all())
    kept = keep if positions == "all" else int(at_the_end)
    if kept and "logits_to_keep" in takes:
        options["logits_to_keep"] = kept
    logits = ssm.run(inputs, **options).logits
    if positions == "all":
        return logits
    return logits[:, -1] if at_the_end else logits[torch.arange(len(logits)), ends.to(logits.device)]


@dataclass(frozen=True)
class FullForwards:
    """Full forwards of a batch under variants.

    Attributes:
        ssm: the attached model.
        inputs: what it is called with, a row per prompt.
        mask: 0 at padding, `[b t]`.
        batch_size: rows of one forward, prompts x variants.
        alone: whether every variant has its own forward, of all prompts: somebody else hooks or edits the model and may
            count on its rows, or a row depends on the others.
        positions: "last" or "all", of which the logits are given.
        keep: see `logits_of_text`.
    """

    ssm: Attachment
    inputs: Mapping[str, Tensor]
    mask: Int[Tensor, "b t"]
    batch_size: int
    alone: bool
    positions: Positions = "last"
    keep: int = 0
    _products: dict[Knockout, list[Product]] = field(default_factory=dict, init=False)
    _in_rows: dict[tuple[Knockout, int], list[tuple[Tensor, Tensor, bytes]]] = field(default_factory=dict, init=False)

    def logits(self, variants: Sequence[Sequence[Intervention]]) -> Iterator[tuple[int, Float[Tensor, "b *t v"]]]:
        """Each variant's number, and the logits of all prompts under it.

        Raises:
            InterventionError: a position that a prompt does not have.
        """
        count, size = len(self.mask), self._rows()
        merged = [number for number, variant in enumerate(variants) if not self.alone and _are_knockouts(variant)]
        each = max(1, size // count)
        for first in range(0, len(merged), each):
            some = merged[first : first + each]
            parts = [
                self._of_rows([variants[number] for number in some], range(start, min(start + size, count)))
                for start in range(0, count, size)
            ]
            yield from zip(some, torch.cat(parts, dim=1), strict=True)
        for number in sorted(set(range(len(variants))) - set(merged)):
            with self.ssm.edit(*(intervention for intervention in variants[number] if self._acts(intervention))):
                yield number, logits_of_text(self.ssm, self.inputs, self.mask, self.positions, self.keep)

    def _rows(self) -> int:
        """How many rows a forward has at most."""
        if self.positions == "last":
            return self.batch_size
        columns = self.keep or self.mask.shape[1]
        vocabulary: int = self.ssm.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        return max(1, min(self.batch_size, MOST_LOGITS // (columns * vocabulary)))

    def _of_rows(self, variants: Sequence[Sequence[Intervention]], rows: range) -> Float[Tensor, "m r *t v"]:
        """The logits of some prompts under some sets of knockouts, as rows of one forward, sets x prompts."""
        chosen, copies = slice(rows.start, rows.stop), len(variants)
        inputs = {
            name: tensor[chosen].repeat(copies, *[1] * (tensor.ndim - 1)) if _is_per_row(tensor, self.mask) else tensor
            for name, tensor in self.inputs.items()
        }
        with self.ssm.edit(*self._merged(variants, chosen)):
            logits = logits_of_text(self.ssm, inputs, self.mask[chosen].repeat(copies, 1), self.positions, self.keep)
        return rearrange(logits, "(m r) ... -> m r ...", m=copies)

    def _merged(self, variants: Sequence[Sequence[Intervention]], rows: slice) -> list[Knockout]:
        """As few knockouts of a batch of sets x prompts as do what each set does to its rows: one for the layers,
        features and targets at which all sets agree."""
        sources: dict[tuple[int, Any, Any, bytes], list[Tensor | None]] = {}
        targets: dict[bytes, Tensor] = {}
        for number, variant in enumerate(variants):
            for knockout, t, s, key in self._edges(variant, rows):
                targets[key] = t
                for layer in self._layers(knockout):
                    at = layer, knockout.features, knockout.through, key
                    sets = sources.setdefault(at, [None] * len(variants))
                    earlier = sets[number]
                    sets[number] = s if earlier is None else earlier | s
        layers: dict[tuple[Any, Any, bytes, bytes], list[int]] = {}
        stacked: dict[bytes, Tensor] = {}
        for (layer, features, through, key), sets in sources.items():
            nothing = torch.zeros_like(targets[key])
            read = torch.cat([nothing if part is None else part for part in sets])
            stacked[name := read.numpy().tobytes()] = read
            layers.setdefault((features, through, key, name), []).append(layer)
        return [
            Knockout(
                sources=_as_rows(stacked[name]),
                targets=_as_rows(targets[key]) * len(variants),
                layers=where,
                features=features,
                through=through,
            )
            for (features, through, key, name), where in layers.items()
        ]

    def _edges(self, variant: Sequence[Intervention], rows: slice) -> Iterator[tuple[Knockout, Tensor, Tensor, bytes]]:
        """The edges of a set of knockouts in some prompts, as far as there are any: targets, sources, and a key of the
        targets."""
        for knockout in variant:
            assert isinstance(knockout, Knockout)
            if (at := (knockout, rows.start)) not in self._in_rows:
                products = [(t[rows].contiguous(), s[rows]) for t, s in self._products_of(knockout)]
                self._in_rows[at] = [(t, s, t.numpy().tobytes()) for t, s in products if reading(t, s).any()]
            for targets, sources, key in self._in_rows[at]:
                yield knockout, targets, sources, key

    def _products_of(self, knockout: Knockout) -> list[Product]:
        if knockout not in self._products:
            columns = Columns(len(self.mask), self.mask.shape[1], self.mask)
            kept = self.mask.bool()
            self._products[knockout] = [(t & kept, s & kept) for t, s in columns.edges(knockout, refuse=False)]
        return self._products[knockout]

    def _acts(self, intervention: Intervention) -> bool:
        """Whether it does anything to these prompts: a knockout of edges of which none exists would be refused."""
        if not isinstance(intervention, Knockout):
            return True
        return any(reading(*product).any() for product in self._products_of(intervention))

    def _layers(self, knockout: Knockout) -> Sequence[int]:
        return self.ssm.layers_with(knockout.through) if knockout.layers is None else as_list(knockout.layers)


def _are_knockouts(variant: Sequence[Intervention]) -> bool:
    return all(isinstance(intervention, Knockout) for intervention in variant)


def _is_per_row(value: Any, mask: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 1 and len(value) == len(mask)


def _as_rows(mask: Tensor) -> RowPositions:
    return tuple(tuple(row.nonzero()[:, 0].tolist()) for row in mask)
