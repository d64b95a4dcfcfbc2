"""What a metric is when sets of edge groups are removed: exact knockouts, many sets side by side in one batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssm_interp.errors import FeatureError
from ssm_interp.features.arguments import whole_texts
from ssm_interp.features.groups import ALL
from ssm_interp.features.metrics import Metric, log_probability, measure
from ssm_interp.hooks import Attachment, Knockout
from ssm_interp.hooks.obstacles import obstacles
from ssm_interp.hooks.positions import position_mask
from ssm_interp.prompts import Batch
from ssm_interp.reprs import short_repr

METRICS: Mapping[str, Callable[[Tensor], Metric]] = {
    "logprob": log_probability,
    "probability": lambda targets: lambda logits: log_probability(targets)(logits).exp(),
    "accuracy": lambda targets: lambda logits: (logits.argmax(1) == targets.to(logits.device)).double(),
}
"""Metrics of the prompts' own targets, by name."""


@dataclass(frozen=True, order=True)
class EdgeGroup:
    """The edges of one layer from the positions of one role to those of another, on a group of features.

    Example:
        >>> print(EdgeGroup(1, source="answer", target="query"))
        layer 1: query <- answer
    """

    layer: int
    source: str
    target: str
    features: str = ALL

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.edge}"

    @property
    def edge(self) -> str:
        """The group without its layer."""
        return f"{self.target} <- {self.source}" + (f" ({self.features})" if self.features != ALL else "")


def fact_roles(batch: Batch) -> dict[str, list[list[int]]]:
    """Columns of a batch by their place around the subject; every column but padding has one role.

    Returns:
        `context` (before the subject), `subject`, `after` (it, but for the last token) and `last`, each with a list of
        columns per row, as `find_circuit(roles=...)` takes them.

    Raises:
        FeatureError: something else than a batch of prompts.

    Example:
        >>> fact_roles(batch)["after"]                      # doctest: +SKIP
        [[9], [5, 6]]
    """
    if not isinstance(batch, Batch):
        raise FeatureError(f"roles of facts are those of a Batch of prompts, got {type(batch).__name__}")
    subject, rest = batch.positions("subject"), batch.positions("relation_minus_last")
    return {
        "context": batch.positions("context"),
        "subject": subject,
        "after": [[c for c in row if c > max(taken)] for row, taken in zip(rest, subject, strict=True)],
        "last": batch.positions("last"),
    }


@dataclass(frozen=True)
class Asked:
    """Prompts whose positions are shared out among roles.

    Attributes:
        inputs: what the model is called with, tensors with a row per prompt.
        mask: 0 at padding, `[b t]`.
        roles: the positions of each role, bool `[b t]`; every position but padding has exactly one role.
        targets: the prompts' target tokens, where they have some.
    """

    inputs: Mapping[str, Tensor]
    mask: Int[Tensor, "b t"]
    roles: Mapping[str, Bool[Tensor, "b t"]]
    targets: Int[Tensor, " b"] | None

    __repr__ = short_repr

    @staticmethod
    def of(ssm: Attachment, inputs: Any, roles: Any) -> Asked:
        """Prompts and roles as `find_circuit` takes them.

        Raises:
            FeatureError: no prompts; roles that overlap, leave a position out, or are missing in a prompt.
            PromptError: an unknown role.
            InterventionError: a role's position outside of a prompt, or in its padding.
        """
        weights = ssm.model.parameters()
        device = next((weight.device for weight in weights if not weight.is_meta), torch.device("cpu"))
        given, kept = whole_texts(ssm, inputs)
        tensors, mask = _tensors(given, device), kept.long().cpu()
        ids = tensors["input_ids"]
        masks = {}
        for role, at in _named(inputs, roles).items():
            positions = Knockout(sources=at).sources
            masks[role] = position_mask(positions, len(ids), ids.shape[1], f"the role {role!r}", mask)
        _check_partition(masks, mask, [row.prompt.text for row in inputs.prompts] if isinstance(inputs, Batch) else ())
        targets = inputs.target_ids.to(device) if isinstance(inputs, Batch) else None
        return Asked(tensors, mask, masks, targets)

    def reads(self, target: str, source: str) -> bool:
        """Whether any position of the target has one of the source at or before it."""
        return bool((self.roles[target] & (self.roles[source].cumsum(1) > 0)).any())

    def columns(self, role: str) -> list[tuple[int, ...]]:
        """The positions of a role in each row."""
        return [tuple(row.nonzero()[:, 0].tolist()) for row in self.roles[role]]


def _tensors(given: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    ids = given["input_ids"]
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) or tensor.shape[:2] != ids.shape:
            got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise FeatureError(f"{name} must be a tensor [b t], as input_ids are ({list(ids.shape)}), got {got}")
    return {name: tensor.to(device) for name, tensor in given.items()}


def _named(inputs: Any, roles: Any) -> dict[str, Any]:
    """Role -> positions, as a Knockout takes them."""
    if roles is None and isinstance(inputs, Batch):
        return dict(fact_roles(inputs))
    if isinstance(roles, str) or not isinstance(roles, Mapping | Sequence) or not roles:
        raise FeatureError(f"roles must be names of roles, or role -> positions; at least one, got {roles!r}")
    if isinstance(roles, Mapping):
        return {str(role): at for role, at in roles.items()}
    if isinstance(inputs, Batch):
        return {str(role): inputs.positions(role) for role in roles}
    if names := [role for role in roles if not isinstance(role, int)]:
        raise FeatureError(
            f"without a Batch of prompts nobody knows which positions are {names[0]!r}; give role -> positions"
        )
    return {str(position): position for position in roles}


def _check_partition(roles: Mapping[str, Tensor], mask: Tensor, texts: Sequence[str]) -> None:
    def where(found: Tensor) -> str:
        row, column = found.nonzero()[0].tolist()
        return f"position {column} of row {row}" + (f", {texts[row]!r}" if texts else "")

    for (one, these), (other, those) in combinations(roles.items(), 2):
        if (shared := these & those).any():
            raise FeatureError(
                f"the roles {one!r} and {other!r} overlap: both have {where(shared)}; the roles of a circuit must not "
                "share a position, such as subject, relation_minus_last and last, or those of `fact_roles`"
            )
    for role, found in roles.items():
        if (empty := ~found.any(1)).any():
            row = int(empty.nonzero()[0, 0])
            text = f", {texts[row]!r}" if texts else ""
            raise FeatureError(
                f"the role {role!r} has no position in row {row}{text}; choose roles that all prompts have, or leave "
                f"{'this prompt' if empty.sum() == 1 else f'these {int(empty.sum())} prompts'} out"
            )
    if (bare := mask.bool() & ~torch.stack(list(roles.values())).any(0)).any():
        raise FeatureError(
            f"no role has {where(bare)}; the roles of a circuit ({', '.join(roles)}) must cover every position"
        )


class Trials:
    """The metric under many sets of removed edge groups.

    Attributes:
        count: sets that were tried.
    """

    def __init__(
        self,
        ssm: Attachment,
        asked: Asked,
        features: Mapping[str, Mapping[int, Any] | None],
        through: Any,
        metric: str | Metric,
        batch_size: int,
    ) -> None:
        self.ssm, self.asked, self.features, self.through = ssm, asked, features, through
        self.metric, self.batch_size, self.count = self._metric(metric), batch_size, 0
        self.columns = {role: asked.columns(role) for role in asked.roles}
        self.takes = inspect.signature(ssm.model.forward).parameters

    def values(self, removed: Sequence[Collection[EdgeGroup]]) -> Iterator[float]:
        """The mean metric over the prompts with each of some sets of edge groups knocked out.

        Raises:
            FeatureError: the metric is not one finite number per prompt.

        Cost: len(removed) x prompts rows through the model, `batch_size` of them in each forward pass. Where somebody
            else edits or hooks the model, who may count on its rows: a forward pass of the prompts for each set.
        """
        count = len(self.asked.mask)
        size = count if any(obstacles(self.ssm)) else self.batch_size
        each = max(1, size // count)
        rows = [range(first, min(first + size, count)) for first in range(0, count, size)]
        for first in range(0, len(removed), each):
            some = removed[first : first + each]
            parts = [self._logits(some, part) for part in rows]
            for logits in torch.cat(parts, dim=1):
                self.count += 1
                yield float(measure(self.metric, logits).double().mean())

    @torch.no_grad()
    def _logits(self, removed: Sequence[Collection[EdgeGroup]], rows: range) -> Float[Tensor, "m r v"]:
        inputs: dict[str, Any] = {
            name: tensor[rows.start : rows.stop].repeat(len(removed), *[1] * (tensor.ndim - 1))
            for name, tensor in self.asked.inputs.items()
        }
        mask = self.asked.mask[rows.start : rows.stop].repeat(len(removed), 1)
        if "position_ids" in self.takes and "position_ids" not in inputs and not mask.all():
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).to(inputs["input_ids"].device)
        ends = (mask * torch.arange(mask.shape[1])).argmax(1)
        if "logits_to_keep" in self.takes and bool((ends == mask.shape[1] - 1).all()):
            inputs["logits_to_keep"], ends = 1, torch.zeros_like(ends)
        with self.ssm.edit(*self._knockouts(removed, rows)):
            logits = self.ssm.run(inputs, use_cache=False).logits
        last = logits[torch.arange(len(ends)), ends.to(logits.device)].double()
        return last.reshape(len(removed), len(rows), -1)

    def _knockouts(self, removed: Sequence[Collection[EdgeGroup]], rows: range) -> list[Knockout]:
        """One knockout per target role and group of features, for all layers in which the sets have the same sources.
        Rows of the batch are sets x prompts."""
        sources: dict[tuple[int, str, str], list[set[str]]] = {}
        for number, groups in enumerate(removed):
            for group in groups:
                place = group.layer, group.target, group.features
                sources.setdefault(place, [set() for _ in removed])[number].add(group.source)
        layers: dict[tuple[str, str, tuple[frozenset[str], ...]], list[int]] = {}
        for (layer, target, features), roles in sources.items():
            layers.setdefault((target, features, tuple(map(frozenset, roles))), []).append(layer)
        return [
            knockout
            for (target, name, roles), where in layers.items()
            for knockout in self._at(target, self.features[name], roles, where, rows)
        ]

    def _at(
        self,
        target: str,
        features: Mapping[int, Any] | None,
        roles: Sequence[Collection[str]],
        layers: list[int],
        rows: range,
    ) -> list[Knockout]:
        read = [tuple(c for role in sorted(some) for c in self.columns[role][row]) for some in roles for row in rows]
        edges = {
            "sources": read,
            "targets": [self.columns[target][row] for row in rows] * len(roles),
            "through": self.through,
        }
        pairs = zip(edges["targets"], read, strict=True)
        if not any(sources and targets and max(targets) >= min(sources) for targets, sources in pairs):
            return []  # in these rows the sources come after the targets
        if features is None:
            return [Knockout(**edges, layers=layers)]
        return [Knockout(**edges, layers=layer, features=features[layer]) for layer in layers]

    def _metric(self, metric: str | Metric) -> Metric:
        if callable(metric):
            return metric
        if not isinstance(metric, str) or metric not in METRICS:
            raise FeatureError(f"there is no metric {metric!r}; there are {', '.join(METRICS)}, or give a function")
        if (targets := self.asked.targets) is None:
            raise FeatureError(
                f"the metric {metric!r} needs the prompts' targets, which a Batch of prompts has; for plain input_ids "
                "give a function from logits at the last token [b v] to a number per row [b]"
            )
        return METRICS[metric](targets)
