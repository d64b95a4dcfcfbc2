"""Every edge's worth in one backward pass: the first-order effect, on any number, of removing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from ssm_interp import plots
from ssm_interp.arguments import as_index
from ssm_interp.attribution.differentiate import Question
from ssm_interp.errors import FeatureError
from ssm_interp.features.arguments import chosen_layers, row_of, row_tokens, whole_number
from ssm_interp.features.groups import Groups, PlainGroups, check_groups
from ssm_interp.hooks import Attachment, HookPoints, warn_hooked
from ssm_interp.hooks.edits.masks import feature_mask
from ssm_interp.hooks.rows.metrics import Metric, Positions
from ssm_interp.results import Result, Tokens, labels, with_tokens
from ssm_interp.scan import edge_products
from ssm_interp.words import ALL


@dataclass(frozen=True, eq=False)
class EdgeAttribution(Result):
    """What removing each edge target <- source would do to a metric, to first order.

    An entry predicts `metric(edge knocked out) - metric`: negative where the edge supports the metric.

    Attributes:
        values: `[b layer t s]`; with feature groups `[b layer group t s]`. Zero for s > t, at padding, and for edges
            that a knockout at work has removed already.
        layers: the layer of each entry of the second dimension.
        features: the groups of the third dimension; None: there is no such dimension.
        mask: False at padding, `[b t]`.
        metric: the clean metric, `[b]`.
        without: the metric with all edges of these layers removed, `[b]`; None for a single step, which does not ask.
        steps: how many gradients each entry is a mean of.
        model: its name.
        tokens: a readable token per column, row by row; None: not known.

    Example:
        >>> edges.top(5)      # doctest: +SKIP
    """

    values: Float[Tensor, "b layer *group t s"]
    layers: tuple[int, ...]
    features: Groups | None
    mask: Bool[Tensor, "b t"]
    metric: Float[Tensor, " b"]
    without: Float[Tensor, " b"] | None
    steps: int
    model: str
    tokens: Tokens | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the feature groups, in the order of the third dimension; none where there is no such dimension."""
        return tuple(self.features or ())

    def __repr__(self) -> str:
        groups = f", groups {list(self.groups)}" if self.groups else ""
        return f"EdgeAttribution({list(self.values.shape)}, layers {list(self.layers)}{groups}, steps {self.steps})"

    @property
    def gap(self) -> Float[Tensor, " b"]:
        """How far the sum of all entries is from `without - metric`: the error of the integral over the steps, `[b]`.

        Raises:
            FeatureError: a single step, which is no integral; feature groups, which need not add up to the whole.
        """
        if self.without is None:
            raise FeatureError("a single gradient is no integral, so it has no error of one; give steps=2 or more")
        if self.groups:
            raise FeatureError("feature groups may overlap or leave some out; the whole is known without them")
        return self.values.flatten(1).sum(1) - (self.without - self.metric)

    @cached_property
    def _table(self) -> pd.DataFrame:
        values = self.values if self.groups else self.values[:, :, None]
        real = (self.mask[:, :, None] & self.mask[:, None, :]).tril()
        row, layer, group, target, source = real[:, None, None].expand(values.shape).nonzero().cpu().numpy().T
        columns = {
            "row": row,
            "layer": np.array(self.layers)[layer],
            "feature_group": np.array(self.groups or (ALL,), dtype=object)[group],
            "target": target,
            "source": source,
            "attribution": values.cpu().numpy()[row, layer, group, target, source],
        }
        return with_tokens(pd.DataFrame(columns), self.tokens)

    @property
    def frame(self) -> pd.DataFrame:
        """A row per edge that exists, padding left out.

        Columns: row, layer, feature_group ("all" without groups), target, source, attribution, and where the tokens are
        known, target_token and source_token.

        Example:
            >>> edges.frame.groupby("layer")["attribution"].sum()      # doctest: +SKIP
        """
        return self._table.copy()

    def top(self, count: int = 10) -> pd.DataFrame:
        """The rows of `frame` with the largest attribution of either sign, the largest first.

        Raises:
            FeatureError: a negative count.

        Example:
            >>> edges.top(3)[["layer", "target", "source"]]              # doctest: +SKIP
        """
        number = whole_number(count, "the number of edges", least=0)
        order = self._table["attribution"].abs().sort_values(ascending=False, kind="stable").index
        return self._table.loc[order[:number]].reset_index(drop=True)

    def plot(self, *, row: int = 0, group: str | None = None, **options: Any) -> Figure:
        """Two maps of a row of the batch, without its padding: `plots.edge_figure`.

        Args:
            row: which row.
            group: which feature group, where there are several.
            options: as of `edge_figure`: target (a position among the row's tokens); title, in place of the model and
                the clean metric; label, in place of what an entry is; scale, in place of the clean metric.

        Raises:
            FeatureError: no such row or group, or a group left open; no position.
            PlotError: a target outside the prompt.

        Example:
            >>> edges.plot(target=-1).savefig("edges.png", dpi=200)     # doctest: +SKIP
        """
        row, group, kept, options = self._chosen(row, group, options)
        values = self.values[row, :, self.groups.index(group)] if group is not None else self.values[row]
        kept = kept.to(values.device)
        return plots.edge_figure(values[:, kept][:, :, kept], layers=self.layers, **options)

    def page(self, *, row: int = 0, group: str | None = None, **options: Any) -> str:
        """The same as an interactive page of HTML, in which target and layer are chosen: `plots.edges_page`.

        Args and errors are those of `plot`.

        Example:
            >>> Path("edges.html").write_text(edges.page())             # doctest: +SKIP
        """
        row, group, kept, options = self._chosen(row, group, options)
        edges = self._table[
            (self._table["row"] == row) & (self._table["feature_group"] == (ALL if group is None else group))
        ]
        index_of = pd.Series(range(len(kept)), index=kept.tolist())  # of a column of the ids among those drawn
        drawn = edges.assign(target=edges["target"].map(index_of), source=edges["source"].map(index_of))
        return plots.edges_page(drawn, **options)

    def _chosen(
        self, row: int, group: str | None, options: Mapping[str, Any]
    ) -> tuple[int, str | None, Int[Tensor, " t"], dict[str, Any]]:
        """What is drawn of a batch: its row, the group, the columns that are no padding, and how."""
        row = row_of(row, len(self.mask))
        if not self.groups and group is not None:
            raise FeatureError(f"this attribution was not split by features, so there is no group {group!r:.200}")
        if self.groups and group not in self.groups:
            raise FeatureError(f"name one of the feature groups {list(self.groups)} to draw, got group={group!r}")
        if (target := as_index(options.get("target", -1))) is None:
            raise FeatureError(f"target is one position of the row, got {options['target']!r:.200}")
        kept = self.mask[row].nonzero()[:, 0]
        named = labels(self.tokens, row, self.mask.shape[1])
        about = f"{plots.short(self.model)}: metric = {float(self.metric[row]):.3g}"
        integrated = f"Share of the change of the metric if all edges are removed ({self.steps} steps)"
        defaults = {
            "title": f"{about}, features: {group}" if self.groups else about,
            "scale": float(self.metric[row]),
            "label": plots.EDGE_LABEL if self.steps == 1 else integrated,
        }
        shown = {"tokens": [named[column] for column in kept.tolist()], "target": target}
        return row, group, kept, defaults | dict(options) | shown


def edge_attribution(
    ssm: Attachment,
    inputs: Any,
    metric: Metric,
    *,
    positions: Positions = "last",
    layers: Any = None,
    features: Groups | None = None,
    steps: int = 1,
    tokens: Any = None,
) -> EdgeAttribution:
    """The first-order effect on a metric of removing each SSM edge, for all edges, layers and groups at once.

    With a mask m on the edges, y = (m * M) x, the entry of an edge is `-d metric / d m[t,s]`, the gradient taken
    through the whole model: how much the metric would change if the edge were knocked out, were the metric linear.

    Args:
        ssm: an attached model in eval mode. Its parameters may or may not want a gradient; their `.grad` is left alone.
        inputs: ids `[b t]`, the mapping of a tokenizer, or a batch of prompts; padding on the left or on the right.
        metric: from logits to one number per row, `[b]`: `logit_difference(answer, other)`, `log_probability(answer)`
            or any differentiable function.
        positions: which logits the metric gets: "last", those of each row's last token that is no padding, `[b v]`; or
            "all", `[b t v]`.
        layers: one or several SSM layers; None: all.
        features: name -> layer -> features, as `feature_groups` gives them, for an attribution by group; a group has no
            entry (zero) in layers that it does not name. None: no split.
        steps: 1 is the plain gradient. More: integrated gradients, the mean of so many gradients while all edges of
            these layers are scaled from 0 to 1 together (at Gauss-Legendre nodes), so that the entries sum to
            `metric(all removed) - metric`.
        tokens: a readable token per column of the ids, or such a sequence per row, for tables and pictures; None: those
            of a batch of prompts, else none.

    Returns:
        The attribution; see `check_edges` for how true it is.

    Raises:
        FeatureError: no gradients (`torch.no_grad`, `torch.inference_mode`); a model in training mode or without SSM
            layers; a metric that is not one finite number per row or does not depend on the logits; no layers, or
            unknown ones; groups that do not fit the model; edits at work that leave an edge no single worth (of some
            features, of states, of the matrix); hooks on hook_write, hook_state or hook_attn; a cache or packed
            sequences among the inputs; steps below 1; tokens of another number than the columns.

    Warns:
        HookedWarning: hooks are on other hook points, under which the gradient is taken.

    Cost: a forward and a backward from the logits down to the first of the layers, for each step, and per layer a
        product of L^2 H P N (Mamba-1) or L^2 H P (Mamba-2) multiplications, for each group in proportion to its heads.
        Memory O(layers groups L^2) beside what the backward needs. On the CPU the library's own operator runs in the
        place of the host's, which is slow to differentiate there; gradients of parameters are not computed.
        Other threads may use the model meanwhile.
    Source: attribution patching (Nanda 2023; Syed et al., arXiv 2310.10348), on the edges of the hidden attention
        (Ali et al., arXiv 2403.01590); integrated gradients (Sundararajan et al., arXiv 1703.01365).

    Example:
        >>> metric = logit_difference(answer=paris, other=rome)                           # doctest: +SKIP
        >>> edge_attribution(ssm, inputs, metric).top(10)                                 # doctest: +SKIP
    """
    steps = whole_number(steps, "steps")
    chosen = tuple(sorted(chosen_layers(ssm, layers)))
    groups = None if features is None else _groups(ssm, features, chosen)
    masks = None if groups is None else _group_masks(ssm, groups, chosen)
    question = Question.of(ssm, inputs, metric, positions, chosen)
    named = row_tokens(tokens, inputs, question.mask)
    warn_hooked(ssm, "the attribution")
    total, clean, without = None, None, None
    for scale, weight in _nodes(steps):
        value, products = _products(question, masks, scale)
        total = weight * products if total is None else total + weight * products
        clean = value
    if steps > 1:
        clean, without = question.value(1.0), question.value(0.0)
    assert total is not None and clean is not None
    return EdgeAttribution(-total, chosen, groups, question.mask, clean, without, steps, ssm.name, named)


def _nodes(steps: int) -> list[tuple[float, float]]:
    """Points and weights of the mean over [0, 1]; a single step stands at 1, the model as it is."""
    if steps == 1:
        return [(1.0, 1.0)]
    points, weights = np.polynomial.legendre.leggauss(steps)
    return [((float(point) + 1) / 2, float(weight) / 2) for point, weight in zip(points, weights, strict=True)]


def _products(
    question: Question, masks: Mapping[int, list[Tensor]] | None, scale: float
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b layer *group t s"]]:
    """The metric, and its gradient with respect to every edge's mask, with all edges scaled."""
    value, calls = question.gradients(scale)
    products = []
    for layer in question.layers:
        sums: Any = 0
        for heads, terms, gradient in calls.pop(layer):
            groups = None if masks is None else [mask[heads] for mask in masks[layer]]
            sums = sums + edge_products(terms, gradient, groups)
        keep = question.edges[layer].to(sums.device)  # b t s
        products.append(torch.where(keep if masks is None else keep[:, None], sums, 0).to(value.device))
    return value, torch.stack(products, dim=1)


def _groups(ssm: Attachment, features: Any, layers: Sequence[int]) -> PlainGroups:
    if not isinstance(features, Mapping) or not features:
        raise FeatureError(
            f"features must be name -> layer -> features, as feature_groups gives, not {features!r:.100}"
        )
    groups = check_groups(ssm, features)
    if missing := [name for name, group in groups.items() if group is not None and not set(layers) & set(group)]:
        raise FeatureError(f"the feature group {missing[0]!r} names none of the layers {list(layers)}")
    return groups


def _group_masks(ssm: Attachment, groups: PlainGroups, layers: Sequence[int]) -> dict[int, list[Tensor]]:
    """The groups of each layer as bool tensors `[h 1]` or `[h n]`."""
    masks: dict[int, list[Tensor]] = {}
    for layer in layers:
        chosen = [None if group is None else group.get(layer, ()) for group in groups.values()]
        masks[layer] = [_mask(group, ssm.layers[layer]) for group in chosen]
    return masks


def _mask(group: tuple[Any, ...] | None, points: HookPoints) -> Tensor:
    if group == ():
        return torch.zeros(points.heads, 1, dtype=torch.bool)
    return feature_mask(group, points.heads, points.state_size)
