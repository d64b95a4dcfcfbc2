"""Attributions beside what they stand for: exact knockouts of single edges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor

from ssm_interp import plots
from ssm_interp.attribution.differentiate import Question
from ssm_interp.attribution.edges import EdgeAttribution
from ssm_interp.errors import FeatureError
from ssm_interp.features.arguments import whole_number
from ssm_interp.hooks import Attachment, Knockout, answers, warn_hooked
from ssm_interp.hooks.rows.answers import Variant
from ssm_interp.hooks.rows.metrics import Metric, Positions, measure
from ssm_interp.results import Result


@dataclass(frozen=True, eq=False, repr=False)
class EdgeCheck(Result):
    """Attributions and exact effects of the same edges.

    Attributes:
        frame: a row per edge: the columns of `EdgeAttribution.frame`, `exact` (the metric with that edge knocked out
            less the clean one), and `chosen`: "top" or "random".

    Example:
        >>> check_edges(ssm, inputs, metric, attribution).correlation()         # doctest: +SKIP
    """

    frame: pd.DataFrame

    def correlation(self, chosen: str | None = None, at_least: float = 0.0) -> float:
        """Spearman's rank correlation of attribution and exact effect; NaN where there is none to be had.

        Args:
            chosen: of the "top" or the "random" edges; None: of all.
            at_least: only of edges whose exact effect is at least so large.

        Raises:
            FeatureError: another word than these.
        """
        if chosen not in (None, "top", "random"):
            raise FeatureError(f"chosen must be 'top', 'random' or None, got {chosen!r}")
        rows = self.frame if chosen is None else self.frame[self.frame["chosen"] == chosen]
        rows = rows[rows["exact"].abs() >= at_least]
        if rows["attribution"].nunique() < 2 or rows["exact"].nunique() < 2:
            return float("nan")
        return float(spearmanr(rows["attribution"], rows["exact"]).statistic)

    def plot(self) -> Figure:
        """A point per edge, exact effect over attribution: `plots.agreement_figure`."""
        return plots.agreement_figure(self.frame)


def check_edges(
    ssm: Attachment,
    inputs: Any,
    metric: str | Metric,
    attribution: EdgeAttribution,
    *,
    positions: Positions = "last",
    top: int = 20,
    random: int = 20,
    seed: int = 0,
) -> EdgeCheck:
    """Knock out the edges of largest attribution, and as many others drawn at random, one at a time.

    Args:
        ssm, inputs, metric, positions: as `edge_attribution` was given them.
        attribution: what it found.
        top: how many of the largest, over all rows of the batch; more than there are: all.
        random: how many of the others.
        seed: of the draw.

    Raises:
        FeatureError: an attribution of other inputs; a negative count; and as `edge_attribution`.

    Cost: rows of one batched step per prompt, see `answers`; a forward for each edge where that cannot be exact, or
        where the metric takes all positions.

    Example:
        >>> check_edges(ssm, inputs, metric, attribution, top=50).frame.head()     # doctest: +SKIP
    """
    if not isinstance(attribution, EdgeAttribution):
        raise FeatureError(f"what is checked is what edge_attribution found, got {type(attribution).__name__}")
    top, random = whole_number(top, "top", least=0), whole_number(random, "random", least=0)
    seed = whole_number(seed, "seed", least=0)
    question = Question.of(ssm, inputs, metric, positions, attribution.layers)
    warn_hooked(ssm, "the check")
    if attribution.mask.shape != question.mask.shape or not torch.equal(attribution.mask, question.mask):
        raise FeatureError(
            f"the attribution is of inputs {list(attribution.mask.shape)} with {int(attribution.mask.sum())} tokens, "
            f"but these are {list(question.mask.shape)} with {int(question.mask.sum())}; give the same inputs to both"
        )
    with torch.no_grad():
        clean = measure(question.metric, question.logits()).to(attribution.metric)
    if not torch.allclose(clean, attribution.metric, rtol=1e-2, atol=1e-2):
        raise FeatureError(
            f"the attribution is of a metric that is {attribution.metric.tolist()} here, but this one is "
            f"{clean.tolist()}; give the same model, inputs and metric to both"
        )
    edges = attribution.top(len(attribution.frame))
    drawn = edges[top:].sample(min(random, max(0, len(edges) - top)), random_state=seed)
    chosen = pd.concat([edges[:top].assign(chosen="top"), drawn.assign(chosen="random")], ignore_index=True)
    exact = np.full(len(chosen), np.nan)
    with torch.no_grad():
        for row, part in chosen.groupby("row"):
            knockouts = {number: _knockout(attribution, edge) for number, edge in part.to_dict("index").items()}
            acting = {number: knockout for number, knockout in knockouts.items() if knockout is not None}
            exact[part.index] = 0.0
            exact[list(acting)] = _effects(question, int(row), list(acting.values()))
    return EdgeCheck(chosen.assign(exact=exact))


def _knockout(attribution: EdgeAttribution, edge: dict[Any, Any]) -> Knockout | None:
    """The knockout of an edge, in a batch of its row alone; None of a group without features in the edge's layer."""
    group = (attribution.features or {}).get(edge["feature_group"])
    features = None if group is None else group.get(edge["layer"])
    if group is not None and features is None:
        return None
    return Knockout(sources=[[edge["source"]]], targets=[[edge["target"]]], layers=edge["layer"], features=features)


def _effects(question: Question, row: int, knockouts: list[Knockout]) -> list[float]:
    """By how much each knockout, of edges of this row alone, changes the metric of its row."""
    clean = question.logits().double()

    def in_row(logits: Float[Tensor, "1 *t v"]) -> Float[Tensor, "1"]:  # noqa: UP037 - jaxtyping, no comment
        changed = clean.clone()
        changed[row] = logits[0]
        return measure(question.metric, changed)[[row]]

    inputs = {name: value[[row]] if isinstance(value, Tensor) else value for name, value in question.inputs.items()}
    variants: list[Variant] = [(), *knockouts]
    values = answers(question.ssm, inputs, variants, in_row, positions=question.positions).values[:, 0]
    changes: list[float] = (values[1:] - values[0]).tolist()
    return changes
