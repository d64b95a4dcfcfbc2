"""Direct logit attribution: what each mixer writes along a difference of logits, by source and feature group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from ssm_interp import plots
from ssm_interp.attribution.decomposition import By, check_by, groups_of, parts_at, tidy
from ssm_interp.attribution.mixers import MixerRecord, precisely, run_recorded
from ssm_interp.attribution.stream import frozen_scale, graph_from, last_norm, written_share
from ssm_interp.errors import FeatureError
from ssm_interp.features.arguments import chosen_layers, columns, row_of, row_tokens, whole_texts
from ssm_interp.features.groups import Groups, check_groups
from ssm_interp.hooks import Attachment
from ssm_interp.hooks.rows.metrics import logits_of, token_ids
from ssm_interp.results import Result, Tokens, labels, with_tokens

MEAN = "mean"


@dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution(Result):
    """What mixers write, directly, along logit(answer) - logit(other) at one position.

    Letters: b batch row, l layer, f feature group, c column (as in `Decomposition`), s source.

    Attributes:
        by: "source" or "input", as in `decompose`.
        position: where the logits are read, a column of the input ids.
        layers: the layers, in the order of l.
        groups: the feature groups, in the order of f.
        parts: the parts of a `Decomposition`, each `[b l f c]`: "ssm", "skip", (by input) "ssm_bias", "skip_bias", and
            "out_bias".
        difference: the logit difference that the model gave, `[b]`.
        model: its name.
        tokens: a readable token per column of the ids, row by row; None: not known.

    Held fixed: the scale of the last norm, and what `Decomposition` holds fixed. Only the direct path counts: what a
    later layer, attention or MLP makes of a mixer's output is theirs.

    Example:
        >>> paris_or_london = logit_attribution(ssm, inputs, paris, london)                          # doctest: +SKIP
        >>> paris_or_london.frame.nlargest(5, "attribution")                                       # doctest: +SKIP
    """

    by: By
    position: int
    layers: tuple[int, ...]
    groups: tuple[str, ...]
    parts: Mapping[str, Float[Tensor, "b l _ _"]]
    difference: Float[Tensor, " b"]
    model: str
    tokens: Tokens | None = None

    @property
    def rest(self) -> Float[Tensor, " b"]:
        """The difference less all that is attributed here: the embedding, attention, MLPs, other layers, biases."""
        return self.difference - sum(part.sum((1, 2, 3)) for part in self.parts.values())

    def by_position(self) -> Float[Tensor, "b l f s"]:
        """All that has a position, at its position: what comes through the operator and past it together."""
        summed, skip = self.parts["ssm"].clone(), self.parts["skip"]
        for lag in range(min(skip.shape[3], self.position + 1)):
            summed[..., self.position - lag] += skip[..., lag]
        return summed

    @property
    def frame(self) -> pd.DataFrame:
        """A row per batch row, layer, part, group and source, and one of part "rest" that makes the sum complete.

        Columns: row, layer, source (missing where there is none), part, feature_group, attribution, and where the
        tokens are known, source_token.
        """
        tables = [
            tidy({name: part[:, [index]] for name, part in self.parts.items()}, layer, [self.position], self.groups)
            for index, layer in enumerate(self.layers)
        ]
        rest = pd.DataFrame({"row": range(len(self.rest)), "part": "rest", "value": self.rest.tolist()})
        table = pd.concat([*tables, rest.reindex(columns=tables[0].columns).astype({"source": "Int64"})])
        table = table.rename(columns={"value": "attribution"}).astype({"layer": "Int64"})
        table = table[["row", "layer", "source", "part", "feature_group", "attribution"]].reset_index(drop=True)
        return with_tokens(table, self.tokens)

    def plot(self, *, row: int = 0, **options: Any) -> Figure:
        """A map of a row of the batch, source token x layer, all feature groups together: `plots.attribution_figure`.

        Args:
            row: which row.
            options: as of `attribution_figure`: subject; title, in place of the model and the difference; label; ax.

        Raises:
            FeatureError: no such row.
            PlotError: a subject outside the prompt.

        Example:
            >>> paris_or_london.plot(title="tiny-mamba1: Paris or London").savefig("logits.png")     # doctest: +SKIP
        """
        values = self.by_position()
        row = row_of(row, len(values))
        named = labels(self.tokens, row, values.shape[3])
        shown = values[row].sum(1)
        whole = f"{float(self.difference[row]):.3g}, of which {float(shown.sum()):.3g} is shown"
        options.setdefault("scale", float(self.difference[row]))
        options.setdefault("title", f"{plots.short(self.model)}\nlogit difference {whole}")
        return plots.attribution_figure(shown, named, self.layers, **options)


def logit_attribution(
    ssm: Attachment,
    inputs: Any,
    answer: Any,
    other: Any = None,
    *,
    position: int = -1,
    by: By = "source",
    layers: Any = None,
    features: Groups | None = None,
    tokens: Any = None,
) -> LogitAttribution:
    """How much each (layer, source, feature group), and each path past the operator, writes along a logit difference.

    Args:
        ssm: an attached causal language model.
        inputs: ids `[b t]`, the mapping of a tokenizer, or a batch of prompts.
        answer: token id, or one per batch row.
        other: the token to compare with, likewise; "mean": the mean of all logits; None: nothing, the answer's logit
            alone (which, unlike a difference, softmax does not see: a constant may be added to all logits).
        position: where the logits are read.
        by: "source" or "input", see `Decomposition`.
        layers: SSM layers, one or a sequence; None: all. What the others write is in the rest.
        features: groups, no feature in two of them; None: all features together.
        tokens: a readable token per column of the ids, or such a sequence per row, for tables and pictures; None: those
            of a batch of prompts, else none.

    Returns:
        The attributions; with `rest` they add up to the difference that the model gave.

    Raises:
        MetricError: what is no token ids, ids outside the vocabulary, or not one per row.
        FeatureError: a position outside the prompt or in padding; tokens of another number than the columns; a model
            without output head, or whose last norm does more than scale; and as `decompose`.

    Cost: a forward, the backward of the output head, a forward over one token (`stream.written_share`), and per layer
        O(L H N + L H P); nothing of the size of `L m` is made.
    Source: direct logit attribution after Elhage et al., A Mathematical Framework for Transformer Circuits (2021), with
        the mixer's output split by `decompose`.

    Example:
        >>> paris_or_london = logit_attribution(ssm, inputs, answer=paris, other=london)             # doctest: +SKIP
        >>> paris_or_london.by_position()[0, :, 0]         # [layer source], for a heat map           # doctest: +SKIP
    """
    check_by(by)
    chosen = chosen_layers(ssm, layers)
    groups = None if features is None else check_groups(ssm, features, disjoint=True)
    given, mask = whole_texts(ssm, inputs)
    column, *more = columns(position, mask, "position")
    if more:
        raise FeatureError(f"position is one position, got {position!r:.200}; ask for each in a call of its own")
    named, norm = row_tokens(tokens, inputs, mask), last_norm(ssm)
    with graph_from(norm) as ends:
        ids, others = token_ids(answer, "answer"), _others(other)  # in here they are no inference tensors
        run, records = run_recorded(ssm, given, chosen)
        logits, end = run.logits, ends[-1]
        with torch.enable_grad():
            difference = _difference(logits[:, column], ids, others)
            slope = _slope(difference, end.leaving)[:, column]
        direction = frozen_scale(end, column) * slope  # b m: in the residual stream
    shares = written_share(ssm, given["input_ids"][:1, -1:])
    with precisely(direction.device):
        by_layer = [
            _attributed(record, column, by, groups, direction * shares[record.layer]) for record in records.values()
        ]
        parts = {name: torch.stack([layer[name] for layer in by_layer], dim=1) for name in by_layer[0]}
    names = tuple(group.name for group in groups_of(records[chosen[0]], groups))
    return LogitAttribution(by, column, tuple(chosen), names, parts, difference.detach().to(direction), ssm.name, named)


def _attributed(
    record: MixerRecord, column: int, by: By, features: Groups | None, direction: Tensor
) -> dict[str, Tensor]:
    """The parts of one layer along a direction in the residual stream, each `[b f c]`."""
    direction = direction.to(record.weight)
    weights = torch.einsum("bm,mhp->bhp", direction, record.weight)

    def along(piece: Tensor, heads: Tensor) -> Tensor:
        return (piece * weights[:, None]).sum(3) @ heads.to(weights)

    parts = parts_at(record, column, by, groups_of(record, features), along)
    return parts | {"out_bias": (direction @ record.bias)[:, None, None]}


def _slope(difference: Float[Tensor, " b"], leaving: Float[Tensor, "b t m"]) -> Float[Tensor, "b t m"]:
    slope = torch.autograd.grad(difference.sum(), leaving, allow_unused=True)[0] if difference.requires_grad else None
    if slope is None:
        raise FeatureError(
            "the output head gives no gradient (quantised layers have none), along which what a layer writes could be "
            "attributed; load the model without quantisation"
        )
    return slope


def _others(other: Any) -> Int[Tensor, " r"] | str | None:
    if other is None or (isinstance(other, str) and other == MEAN):
        return other
    if isinstance(other, str):
        raise FeatureError(f"other is a token id, one per row, {MEAN!r} or None; got {other!r}")
    return token_ids(other, "other")


def _difference(logits: Float[Tensor, "b v"], ids: Tensor, others: Tensor | str | None) -> Float[Tensor, " b"]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wanted = logits_of(logits, ids, "answer")
    if others is None:
        return wanted
    return wanted - (logits.mean(1) if isinstance(others, str) else logits_of(logits, others, "other"))
