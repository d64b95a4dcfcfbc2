"""What a metric is when sets of edge groups are removed: exact knockouts, many sets side by side in one batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ssm_interp.arguments import as_list
from ssm_interp.errors import FeatureError
from ssm_interp.features.arguments import whole_texts
from ssm_interp.hooks import Attachment, Knockout, answers
from ssm_interp.hooks.edits.masks import Columns
from ssm_interp.hooks.rows.asked import device_of
from ssm_interp.hooks.rows.metrics import Metric
from ssm_interp.prompts import Batch
from ssm_interp.reprs import short_repr
from ssm_interp.words import ALL


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
class Roles(Mapping[str, Tensor]):
    """Prompts whose positions are shared out among roles; a mapping of what the model is called with.

    Attributes:
        inputs: what the model is called with, tensors with a row per prompt.
        mask: 0 at padding, `[b t]`.
        roles: the positions of each role, bool `[b t]`; every position but padding has exactly one role.
        answer_ids: first tokens of the prompts' answers, where they have some.
    """

    inputs: Mapping[str, Tensor]
    mask: Int[Tensor, "b t"]
    roles: Mapping[str, Bool[Tensor, "b t"]]
    answer_ids: Int[Tensor, " b"] | None

    __repr__ = short_repr

    def __getitem__(self, name: str) -> Tensor:
        return self.inputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    @staticmethod
    def of(ssm: Attachment, inputs: Any, roles: Any) -> Roles:
        """Prompts and roles as `find_circuit` takes them.

        Raises:
            FeatureError: no prompts; roles that overlap, leave a position out, or are missing in a prompt.
            PromptError: an unknown role.
            InterventionError: a role's position outside of a prompt, or in its padding.
        """
        device = device_of(ssm.model)
        given, kept = whole_texts(ssm, inputs)
        tensors, mask = _tensors(given, device), kept.long().cpu()
        ids = tensors["input_ids"]
        masks = {}
        for role, at in _named(inputs, roles).items():
            named = at if isinstance(at, int) or len(at) else [()] * len(ids)
            masks[role] = Columns(len(ids), ids.shape[1], mask).positions(named, f"the role {role!r}")
        _check_partition(masks, mask, [row.prompt.text for row in inputs.prompts] if isinstance(inputs, Batch) else ())
        answer_ids = inputs.answer_ids.to(device) if isinstance(inputs, Batch) else None
        return Roles(tensors, mask, masks, answer_ids)

    def reads(self, target: str, source: str) -> bool:
        """Whether any position of the target has one of the source at or before it."""
        return bool((self.roles[target] & (self.roles[source].cumsum(1) > 0)).any())

    def positions(self, role: str) -> list[tuple[int, ...]]:
        """The columns of a role in each row."""
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
    def where(overlap: Tensor) -> str:
        row, column = overlap.nonzero()[0].tolist()
        return f"position {column} of row {row}" + (f", {texts[row]!r}" if texts else "")

    for (first, these), (other, those) in combinations(roles.items(), 2):
        if (shared := these & those).any():
            raise FeatureError(
                f"the roles {first!r} and {other!r} overlap: both have {where(shared)}; the roles of a circuit must "
                "not share a position, such as subject, relation_minus_last and last, or those of `fact_roles`"
            )
    for role, positions in roles.items():
        if (empty := ~positions.any(1)).any():
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
        prompts: Roles,
        features: Mapping[str, Mapping[int, Any] | None],
        metric: str | Metric,
        batch_size: int,
    ) -> None:
        self.ssm, self.prompts, self.features, self.metric = ssm, prompts, features, metric
        self.batch_size, self.count = batch_size, 0
        self._resolved: dict[Knockout, Knockout] = {}

    def values(self, removed: Sequence[Collection[Knockout]], progress: Callable[[int], object]) -> list[float]:
        """The mean metric over the prompts with each of some sets of edge groups knocked out.

        Args:
            progress: called with the number of sets that have been tried, ever.

        Raises:
            MetricError: the metric is not one finite number per prompt.

        Cost: as `answers`: len(removed) x prompts rows through the model, `batch_size` of them in each forward pass.
        """
        rows, before = len(self.prompts.mask), self.count
        answered = 0

        def report(count: int) -> None:
            nonlocal answered
            answered += count
            self.count = before + answered // rows
            progress(self.count)

        result = answers(
            self.ssm,
            self.prompts,
            [[self._knockout(group) for group in groups] for groups in removed],
            self.metric,
            allow_no_edges=True,
            by="forwards",
            batch_size=self.batch_size,
            progress=report,
        )
        means: list[float] = result.values.mean(1).tolist()
        return means

    def _knockout(self, group: Knockout) -> Knockout:
        """An edge group with the positions of its roles, and the features that it names."""
        if group not in self._resolved:
            features = self.features[str(group.features)]
            chosen = None if features is None else features[layer_of(group)]
            self._resolved[group] = group.resolve(self.prompts).replace(features=chosen)
        return self._resolved[group]


def edge_group(layer: int, source: str, target: str, features: str = ALL, through: Any = None) -> Knockout:
    """The edges of one layer from the positions of one role to those of another, on a group of features.

    Example:
        >>> describe_edge(edge_group(1, source="answer", target="query"))
        'query <- answer'
    """
    return Knockout(sources=source, targets=target, layers=layer, features=features, through=through)


def layer_of(group: Knockout) -> int:
    """The layer of an edge group."""
    (layer,) = as_list(group.layers)
    return int(layer)


def edge_of(group: Knockout) -> tuple[str, str]:
    """The roles of an edge group, target and source."""
    (target,), (source,) = as_list(group.targets), as_list(group.sources)
    return str(target), str(source)


def describe_edge(group: Knockout) -> str:
    """An edge group without its layer."""
    return " <- ".join(edge_of(group)) + (f" ({group.features})" if group.features != ALL else "")
