"""Circuit search: which edge groups (layer x source role x target role) a behaviour needs, by exact knockouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from ssm_interp.arguments import as_indices, as_number
from ssm_interp.circuits.trials import Roles, Trials, describe_edge, edge_group, edge_of, layer_of
from ssm_interp.errors import FeatureError, InterventionError
from ssm_interp.features.arguments import whole_number
from ssm_interp.features.groups import check_attached, check_groups, feature_groups
from ssm_interp.hooks import Attachment, Knockout, Metric, warn_hooked
from ssm_interp.hooks.rows.metrics import NAMES
from ssm_interp.plots import circuit_figure, circuit_page, short
from ssm_interp.prompts import Batch, warn_shared
from ssm_interp.results import Result
from ssm_interp.words import ALL


@dataclass(frozen=True, repr=False)
class Circuit(Result):
    """The edge groups that a search could not remove, and what was found on the way.

    Attributes:
        groups: those that are left, by layer, target and source.
        removed: the others, in the order of their removal.
        effects: group of the circuit -> how the metric changes if it is removed from the circuit too.
        clean: the mean metric with every edge in place.
        alone: with the circuit's edges only.
        empty: with every edge group removed.
        tolerance: how far from `clean` the search let the metric go, in the metric's units.
        roles: the roles of the positions, in the order in which they were given.
        metric: its name; "metric" where it is a function.
        model: its name.
        prompts: how many prompts the metric is a mean over.
        trials: how many sets of knockouts were tried, each on every prompt.
        log: a row per round and group that was still there: round, layer, source, target, feature_group, metric (with
            that group removed too), change (of the metric from `clean`), removed (whether the round removed it).
        first_tokens: how many of the prompts were asked for the first token alone of an answer that has several.
    """

    groups: tuple[Knockout, ...]
    removed: tuple[Knockout, ...]
    effects: Mapping[Knockout, float]
    clean: float
    alone: float
    empty: float
    tolerance: float
    roles: tuple[str, ...]
    metric: str
    model: str
    prompts: int
    trials: int
    log: pd.DataFrame
    first_tokens: int = 0

    holds = (Knockout,)

    @property
    def faithfulness(self) -> float:
        """How much of what all edges together do to the metric the circuit does alone: 1 all of it, 0 nothing; not a
        number where they do nothing."""
        return (self.alone - self.empty) / (self.clean - self.empty) if self.clean != self.empty else math.nan

    @property
    def frame(self) -> pd.DataFrame:
        """A row per edge group: layer, source, target, feature_group, kept, effect (NaN where it was removed)."""
        rows = [
            (*_labels(group), group in self.effects, self.effects.get(group))
            for group in sorted((*self.groups, *self.removed), key=self._order)
        ]
        columns = ["layer", "source", "target", "feature_group", "kept", "effect"]
        return pd.DataFrame(rows, columns=columns).astype({"effect": float})

    def plot(self) -> Figure:
        """The circuit as a picture, see `plots.circuit_figure`."""
        return circuit_figure(self.frame, **self._drawn)

    def page(self) -> str:
        """The same as an interactive page of HTML, see `plots.circuit_page`."""
        return circuit_page(self.frame, **self._drawn)

    @property
    def _drawn(self) -> dict[str, Any]:
        title = f"{short(self.model)}, {self._counted}\n{self._size}, {self._faithful}"
        return {"roles": self.roles, "title": title, "metric": NAMES.get(self.metric, "the metric")}

    def __str__(self) -> str:
        numbers = f"clean {self.clean:.4g}, circuit alone {self.alone:.4g}, all removed {self.empty:.4g}"
        edges = {group: describe_edge(group) for group in self.groups}
        width = max(map(len, edges.values()), default=0)
        lines = [
            f"  layer {layer_of(group):<3} {edge:<{width}}   {self.effects[group]:+.3g}"
            for group, edge in edges.items()
        ]
        return "\n".join(
            [
                f"circuit: {self._size}, {self._faithful}",
                f"{self.metric} (mean over {self._counted}): {numbers}; tolerance {self.tolerance:.4g}",
                *(["what removing a group from the circuit does to it:"] if lines else []),
                *lines,
            ]
        )

    @property
    def _counted(self) -> str:
        first = f", {self.first_tokens} by first token" if self.first_tokens else ""
        return f"{self.prompts} prompt{'' if self.prompts == 1 else 's'}{first}"

    @property
    def _size(self) -> str:
        return f"{len(self.groups)} of {len(self.groups) + len(self.removed)} edge groups"

    @property
    def _faithful(self) -> str:
        return f"faithfulness {self.faithfulness:.3f}"

    def _order(self, group: Knockout) -> tuple[int, int, int, str]:
        target, source = edge_of(group)
        return layer_of(group), self.roles.index(target), self.roles.index(source), str(group.features)


def _labels(group: Knockout) -> tuple[int, str, str, str]:
    """What stands for an edge group in tables: layer, source, target, feature group."""
    target, source = edge_of(group)
    return layer_of(group), source, target, str(group.features)


def find_circuit(
    ssm: Attachment,
    inputs: Batch | Tensor | Mapping[str, Any],
    *,
    tolerance: SupportsFloat,
    relative: bool = False,
    roles: Sequence[str | int] | Mapping[str, Any] | None = None,
    metric: str | Metric = "log_probability",
    layers: Any = None,
    features: Mapping[str, Mapping[int, Any] | None] | Sequence[str] | None = None,
    through: str | Sequence[str] | None = None,
    batch_size: int = 256,
    progress: Callable[[int, int], object] | None = None,
) -> Circuit:
    """Remove edge groups, those that matter least first, as long as the metric stays near its clean value.

    An edge group is all edges of a layer from one role to another (one to itself included), on a group of features. In
    every round each group that is left is tried: removed together with all that are gone. In the order of how little
    that moves the metric (equal ones by layer, target, source and features), as many of them are removed at once as
    keep it within the tolerance: the longest run from the start of that order, tried as it stands. The search ends
    where no single group can go. So every group of the circuit is needed, given the others; another circuit may exist.

    Args:
        ssm: an attached model, in eval mode; edits that are at work are part of its clean run.
        inputs: a batch of prompts (`pad([tokenize(prompt, tokenizer), ...])`), `input_ids` `[b t]`, or the mapping of
            a tokenizer.
        tolerance: how far the mean metric may move from its clean value, up or down.
        relative: the tolerance is a share of how far the metric moves when every edge group is removed, so that 0.1
            keeps the faithfulness between 0.9 and 1.1; else it is in the metric's units.
        roles: who the positions are: roles or single positions of the prompts of a batch, or a name for each set of
            columns, as a Knockout takes positions; None: `fact_roles`. Every position but padding must have exactly
            one role.
        metric: a name, as `answers` takes it, about the first tokens of the prompts' answers; or a function from the
            logits at the last token `[b v]` (float64) to a number per prompt `[b]`.
        layers: in which edges are removed, one or a sequence; None: all that have the streams.
        features: groups of features, as `flow.sweep` takes them, no two with the same feature; the edges of features
            that are in none stay in place. None: all features together.
        through: the streams in which edges are removed, see `Knockout`; of edges between neighbours the convolution
            carries a part unless it is among them.
        batch_size: prompts x trials per forward pass; where the model is edited or hooked, every trial has its own.
        progress: called with (trials done, trials known to be needed so far).

    Raises:
        FeatureError: a tolerance that is negative or not finite, or relative to edges without any effect; no prompts;
            roles that overlap, leave a position out or are missing in a prompt; feature groups that overlap, are
            empty, or not the model's; no layers; a batch size below 1; a model in training mode.
        MetricError: an unknown metric, or one that is not a finite number per prompt.
        InterventionError: a layer, stream or feature that the model does not have; a position outside of a prompt.
        PromptError: an unknown role.

    Warns:
        SharedTokenWarning: prompts ask for a first token with which the answers of others begin too.
        HookedWarning: hooks are on hook points, under which every trial runs.

    Cost: with k edge groups, up to 2k trials in each round, and a few rounds (k at most); a trial is a forward pass of
        the prompts with knockouts at its layers, and trials share forward passes. `Circuit.trials` counts them.
    Source: greedy edge removal as in automated circuit discovery (Conmy et al. 2023, arXiv 2304.14997), here of SSM
        edges by role, with knockouts in place of patches.

    Example:
        >>> model, tokenizer = si.load("tiny-induction-mamba2")                                 # doctest: +SKIP
        >>> batch = pad([tokenize(prompt, tokenizer) for prompt in induction_prompts(64)])      # doctest: +SKIP
        >>> with si.attach(model) as ssm:                                                       # doctest: +SKIP
        ...     circuit = find_circuit(ssm, batch, roles=induction_roles(batch), tolerance=0.1, relative=True)
        >>> print(circuit)                                                                      # doctest: +SKIP
    """
    check_attached(ssm)
    if ssm.model.training:
        raise FeatureError(f"{type(ssm.model).__name__} is in training mode; call model.eval() first")
    if progress is not None and not callable(progress):
        raise FeatureError(f"progress must be a function of (trials done, trials known), got {progress!r:.200}")
    warn_hooked(ssm, "the circuit search")
    batch_size, allowed = whole_number(batch_size, "batch_size"), _tolerance(tolerance)
    where = _layers(ssm, layers, through)
    shares = _features(ssm, features, where, through)
    asked = Roles.of(ssm, inputs, roles)
    trials = Trials(ssm, asked, shares, metric, batch_size)
    prompts = inputs.prompts if isinstance(inputs, Batch) and isinstance(metric, str) else ()
    warn_shared(prompts)
    everything = [
        edge_group(layer, source, target, name, through)
        for layer in where
        for target in asked.roles
        for source in asked.roles
        for name, chosen in shares.items()
        if asked.reads(target, source) and (chosen is None or layer in chosen)
    ]
    search = _Search(trials, everything, progress)
    search.run(_absolute(allowed, search.clean, search.empty) if relative else allowed)
    return Circuit(
        groups=tuple(search.kept),
        removed=tuple(search.removed),
        effects=search.effects,
        clean=search.clean,
        alone=search.now,
        empty=search.empty,
        tolerance=search.tolerance,
        roles=tuple(asked.roles),
        metric=metric if isinstance(metric, str) else "metric",
        model=ssm.name,
        prompts=len(asked.mask),
        trials=trials.count,
        log=pd.DataFrame(search.log, columns=LOG),
        first_tokens=sum(len(row.answer_ids) > 1 for row in prompts),
    )


LOG = ["round", "layer", "source", "target", "feature_group", "metric", "change", "removed"]


class _Search:
    """A search as it goes: what is kept, what is removed, and the metric with that removed."""

    def __init__(
        self, trials: Trials, everything: list[Knockout], progress: Callable[[int, int], object] | None
    ) -> None:
        self.trials, self.progress = trials, progress
        self.kept, self.removed = everything, list[Knockout]()
        self.effects: dict[Knockout, float] = {}
        self.log: list[tuple[Any, ...]] = []
        self.clean, self.empty = self._try([(), everything])
        self.now, self.tolerance = self.clean, 0.0

    def run(self, tolerance: float) -> None:
        self.tolerance = tolerance
        number = 0
        while self.kept:
            number += 1
            without = dict(zip(self.kept, self._try([[*self.removed, group] for group in self.kept]), strict=True))
            order = sorted(self.kept, key=lambda group: abs(without[group] - self.clean))
            gone = self._longest([group for group in order if self._near(without[group])], without)
            self.log += [
                (number, *_labels(group), value, value - self.clean, group in gone) for group, value in without.items()
            ]
            if not gone:
                self.effects = {group: without[group] - self.now for group in self.kept}
                return
            self.removed += gone
            self.kept = [group for group in self.kept if group not in gone]
            self.now = self.last

    def _longest(self, order: list[Knockout], without: Mapping[Knockout, float]) -> list[Knockout]:
        """The most groups from the start of an order that can go together; `last` is the metric without them."""
        values = [without[group] for group in order[:1]]
        values += self._try([[*self.removed, *order[:count]] for count in range(2, len(order) + 1)])
        most = max((count for count, value in enumerate(values, start=1) if self._near(value)), default=0)
        self.last = values[most - 1] if most else self.now
        return order[:most]

    def _near(self, value: float) -> bool:
        return abs(value - self.clean) <= self.tolerance

    def _try(self, removed: Sequence[Sequence[Knockout]]) -> list[float]:
        if not removed:
            return []
        total = self.trials.count + len(removed)
        return self.trials.values(removed, lambda done: self.progress and self.progress(done, total))


def _tolerance(tolerance: Any) -> float:
    try:
        number = as_number(tolerance, "tolerance")
    except InterventionError:
        number = -1.0
    if number < 0:
        raise FeatureError(f"tolerance must be a finite number, at least 0, got {tolerance!r:.200}")
    return number


def _absolute(share: float, clean: float, empty: float) -> float:
    if clean == empty:
        raise FeatureError(
            f"removing every edge group leaves the metric at {clean:.4g}, so a tolerance relative to that means "
            "nothing; give one in the metric's units (relative=False), other prompts, or another metric"
        )
    return share * abs(clean - empty)


def _layers(ssm: Attachment, layers: Any, through: Any) -> list[int]:
    known = ssm.layers_with(through)
    chosen = as_indices(layers, "layers")
    if chosen == ():
        raise FeatureError(f"a circuit search needs at least one layer; {type(ssm.model).__name__} has {list(known)}")
    ssm.check(Knockout(layers=chosen, through=through))
    return sorted(set(known if chosen is None else chosen))


def _features(ssm: Attachment, features: Any, layers: list[int], through: Any) -> dict[str, Any]:
    """Groups of features, of which no two have the same feature."""
    if features is None:
        return {ALL: None}
    given = features if isinstance(features, Mapping) else feature_groups(ssm, features)
    groups = check_groups(ssm, given, disjoint=True)
    if not any(chosen is None or set(chosen) & set(layers) for chosen in groups.values()):
        raise FeatureError(f"features has no group for any of the layers {layers}; None means all features together")
    for by_layer in groups.values():
        for layer, chosen in (by_layer or {}).items():
            if layer in layers:
                ssm.check(Knockout(layers=layer, features=chosen, through=through))
    return groups
