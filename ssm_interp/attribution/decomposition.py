"""A mixer's output as a sum over the positions that it reads, features, and the paths that pass the operator by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from ssm_interp import plots
from ssm_interp.attribution.mixers import MixerRecord, precisely, run_recorded
from ssm_interp.errors import FeatureError
from ssm_interp.features.arguments import chosen_layers, columns, row_of, row_tokens, whole_texts
from ssm_interp.features.groups import Groups, check_groups
from ssm_interp.hooks import Attachment
from ssm_interp.reprs import short_repr
from ssm_interp.results import ByLayer, Result, Tokens, labels, with_tokens
from ssm_interp.scan import Terms, attention_rows
from ssm_interp.scan.unified import unified_rows
from ssm_interp.words import ALL

By = Literal["source", "input"]
Put = Callable[[Tensor, Tensor], Tensor]  # [b c h p] and which heads, [h] -> [b c *out]

OTHER = "other"
PARTS = ("ssm", "skip", "ssm_bias", "skip_bias", "out_bias")


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition(Result):
    """The output of one mixer at some targets, as a sum.

    Letters: b batch row, r target, f feature group, c column, m model dimension (before the output projection: h p).

    Attributes:
        layer: index of the layer in the model.
        by: "source": what the operator carries from each source s, x_s whole; "input": x_s taken apart further, into
            the inputs of the convolution at positions s-3 .. s and the convolution's bias.
        targets: the target positions.
        groups: names of the feature groups, in the order of f. "other" holds what no group names.
        parts: name -> `[b r f c *]`, with f and c as follows.
            "ssm": through the operator; c is the position, of the source or of the convolution's input.
            "skip": past the operator, D x_t; by source c is 0 alone, by input it is the tap: c positions before t.
            "ssm_bias", "skip_bias": by input, what the convolution's bias gives through the operator and past it.
            "out_bias": of the output projection (not before it); belongs to no group, so f is 1.
        whole: what the host itself computed, `[b r *]`.
        model: its name.
        tokens: a readable token per column of the ids, row by row; None: not known.

    Held fixed, at their values in this forward: dt, B and C (so M), the gate and the scale of a norm behind it, and by
    input the slope Z of the convolution's SiLU. How these depend on the tokens is not part of the sum. Everything else
    is linear, so nothing is lost: `rest` is rounding, unless a hook of yours edits y or attn.

    Example:
        >>> layer_3 = decompose(ssm, inputs)[3]                                              # doctest: +SKIP
        >>> sum(part.sum((2, 3)) for part in layer_3.parts.values()) + layer_3.rest   # layer_3.whole   # doctest: +SKIP
    """

    layer: int
    by: By
    targets: tuple[int, ...]
    groups: tuple[str, ...]
    parts: Mapping[str, Float[Tensor, "b r ..."]]
    whole: Float[Tensor, "b r ..."]
    model: str
    tokens: Tokens | None = None

    @property
    def rest(self) -> Float[Tensor, "b r ..."]:
        """What the sum of all parts leaves of the whole."""
        return self.whole - sum(part.sum((2, 3)) for part in self.parts.values())

    def by_position(self) -> Float[Tensor, "b r f s ..."]:
        """All that has a position, at its position: what comes through the operator and past it together."""
        summed, skip = self.parts["ssm"].clone(), self.parts["skip"]
        for row, target in enumerate(self.targets):
            for lag in range(min(skip.shape[3], target + 1)):
                summed[:, row, :, target - lag] += skip[:, row, :, lag]
        return summed

    @property
    def frame(self) -> pd.DataFrame:
        """A row per batch row, target, part, group and position that can be read, with the length of that vector.

        Columns: row, layer, target, part, feature_group, source (missing where there is none), norm, and where the
        tokens are known, target_token and source_token.
        """
        axes = tuple(range(4, self.parts["ssm"].ndim))
        norms = {name: torch.linalg.vector_norm(part, dim=axes) for name, part in self.parts.items()}
        table = tidy(norms, self.layer, self.targets, self.groups).rename(columns={"value": "norm"})
        return with_tokens(table, self.tokens)

    def lengths(self, row: int, target: int | None, group: str | None) -> Float[Tensor, " s"]:
        """How much each position writes at a target, in norm: of a group, or of the sum of all.

        Raises:
            FeatureError: no such row, target or group; a target left open where there are several.
        """
        row = row_of(row, len(self.whole))
        if target is None and len(self.targets) > 1:
            raise FeatureError(f"name one of the targets {list(self.targets)} to draw")
        if target is not None and target not in self.targets:
            raise FeatureError(f"target {target!r:.200} was not asked for; there are {list(self.targets)}")
        if group is not None and group not in self.groups:
            raise FeatureError(f"there is no feature group {group!r:.200}; there are {list(self.groups)}")
        at = self.by_position()[row, 0 if target is None else self.targets.index(target)]  # f s *
        written = at.sum(0) if group is None else at[self.groups.index(group)]
        lengths: Tensor = torch.linalg.vector_norm(written.flatten(1), dim=1)
        return lengths

    def plot(self, *, row: int = 0, target: int | None = None, group: str | None = None, **options: Any) -> Figure:
        """How much each position writes, as a map of one layer: see `Decompositions.plot`."""
        return Decompositions({self.layer: self}).plot(row=row, target=target, group=group, **options)


@dataclass(frozen=True, eq=False, repr=False)
class Decompositions(ByLayer[Decomposition]):
    """Layer -> its decomposition.

    Example:
        >>> decompose(ssm, inputs).frame.groupby("layer")["norm"].sum()                    # doctest: +SKIP
        >>> decompose(ssm, inputs).plot().savefig("written.png")                           # doctest: +SKIP
    """

    holds = (Decomposition,)

    def plot(self, *, row: int = 0, target: int | None = None, group: str | None = None, **options: Any) -> Figure:
        """How much each position writes at a target in each layer, in norm: `plots.attribution_figure`.

        Args:
            row: which row of the batch.
            target: which of the targets, where there are several.
            group: of which feature group; None: of all together.
            options: as of `attribution_figure`: subject; title, in place of the model and the target; label; ax.

        Raises:
            FeatureError: no such row, target or group; a target left open where there are several.
            PlotError: a subject outside the prompt.
        """
        written = torch.stack([layer.lengths(row, target, group).cpu() for layer in self.values()])
        first = next(iter(self.values()))
        features = "" if group is None else f", features: {group}"
        position = first.targets[0] if target is None else target
        options.setdefault("title", f"{plots.short(first.model)}\nwritten at position {position}{features}")
        options.setdefault("label", "Length of what is written")
        named = labels(first.tokens, row, written.shape[1])
        return plots.attribution_figure(written, named, list(self), **{"signed": False} | options)


def decompose(
    ssm: Attachment,
    inputs: Any,
    *,
    targets: Any = -1,
    layers: Any = None,
    by: By = "source",
    features: Groups | None = None,
    project: bool = True,
    tokens: Any = None,
) -> Decompositions:
    """Write the output of each mixer at some targets as a sum; see `Decomposition` for its parts.

    Args:
        ssm: an attached model.
        inputs: ids `[b t]`, the mapping of a tokenizer, or a batch of prompts.
        targets: positions, one or a sequence; negative ones count from the end.
        layers: SSM layers, one or a sequence; None: all.
        by: "source" or "input".
        features: groups, as `feature_groups` gives; no feature in two of them. None: all features together. The skip
            and the biases of a head go to the group that has all of it, else to "other".
        project: behind the output projection, in the residual stream's dimensions m; else before it, `[h p]`.
        tokens: a readable token per column of the ids, or such a sequence per row, for tables and pictures; None: those
            of a batch of prompts, else none.

    Returns:
        Layer -> its decomposition. Sums agree with the host's own output to rounding (`rest`).

    Raises:
        FeatureError: unknown layers, targets outside the prompt or in padding, groups that do not exist or overlap, an
            unknown `by`; tokens of another number than the columns; and as `record_mixers`.

    Cost: one forward, and per layer and target O(L H N) for the row of M and O(L H P m) for the projection (by input
        O(L H P K) beside); the result has `b r f L m` numbers. A group of (head, state dimension) pairs takes a row
        of M of its own.
    Source: linearity of the operator in x; for the convolution see `scan.unified`.

    Example:
        >>> last = decompose(ssm, tokenizer("The capital of France is", return_tensors="pt"))[3]   # doctest: +SKIP
        >>> last.parts["ssm"][0, 0, 0].norm(dim=-1)          # how much each source writes          # doctest: +SKIP
    """
    check_by(by)
    chosen = chosen_layers(ssm, layers)
    groups = None if features is None else check_groups(ssm, features, disjoint=True)
    given, mask = whole_texts(ssm, inputs)
    positions, named = columns(targets, mask), row_tokens(tokens, inputs, mask)
    _, records = run_recorded(ssm, given, chosen)
    with precisely(records[chosen[0]].terms.x.device):
        return Decompositions(
            {
                layer: _decomposed(record, positions, by, groups, project, ssm.name, named)
                for layer, record in records.items()
            }
        )


def _decomposed(
    record: MixerRecord,
    targets: list[int],
    by: By,
    features: Groups | None,
    project: bool,
    model: str,
    tokens: Tokens | None,
) -> Decomposition:
    groups = groups_of(record, features)

    def onto_stream(piece: Tensor, heads: Tensor) -> Tensor:
        if not heads.all():
            return piece[:, :, heads].flatten(2) @ record.weight[:, heads].flatten(1).T
        return piece.flatten(2) @ record.weight.flatten(1).T

    def as_they_are(piece: Tensor, heads: Tensor) -> Tensor:
        return torch.where(heads[:, None], piece, 0)

    rows = [parts_at(record, target, by, groups, onto_stream if project else as_they_are) for target in targets]
    parts = {name: torch.stack([row[name] for row in rows], dim=1) for name in rows[0]}
    if project:
        parts["out_bias"] = record.bias.expand(len(record.output), len(targets), 1, 1, -1)
    whole = (record.output if project else record.inner)[:, targets]
    names = tuple(group.name for group in groups)
    return Decomposition(record.layer, by, tuple(targets), names, parts, whole, model, tokens)


class Group(NamedTuple):
    """Features of one layer.

    Attributes:
        name: the group's.
        dims: which state dimensions of which heads, `[h n]`.
        heads: the heads whose skip and biases it has, `[h]`.
    """

    name: str
    dims: Bool[Tensor, "h n"]
    heads: Bool[Tensor, " h"]

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def whole_heads(self) -> bool:
        """Whether it has heads alone, no single state dimensions."""
        return torch.equal(self.dims, self.heads[:, None].expand_as(self.dims))


def groups_of(record: MixerRecord, features: Groups | None) -> list[Group]:
    """The groups' features in one layer, and as "other" those of no group."""
    none = torch.zeros(record.terms.heads, record.terms.state_size, dtype=torch.bool)
    if features is None:
        return [_group(ALL, ~none, record)]
    if OTHER in features:
        raise FeatureError(f"a group cannot be named {OTHER!r}, which is what the features of no group are; rename it")
    groups = []
    for name, by_layer in features.items():
        dims = none.clone()
        for feature in range(len(none)) if by_layer is None else by_layer.get(record.layer, ()):
            dims[feature] = True
        groups.append(_group(name, dims, record))
    other = _group(OTHER, none, record)
    taken = torch.stack([other.dims, *(group.dims for group in groups)]).any(0)
    heads = torch.stack([other.heads, *(group.heads for group in groups)]).any(0)
    return [*groups, Group(OTHER, ~taken, ~heads)]


def _group(name: str, dims: Tensor, record: MixerRecord) -> Group:
    """A group that has the skip and the biases of the heads of which it has all state dimensions."""
    dims = dims.to(record.terms.x.device)
    return Group(name, dims, dims.all(1))


def parts_at(record: MixerRecord, target: int, by: By, groups: Sequence[Group], put: Put) -> dict[str, Tensor]:
    """The parts at one target, name -> `[b f c *out]`, each put where it is wanted by `put`."""
    past = _past_operator(record, target, by)
    beside = {name: torch.stack([put(piece, group.heads) for group in groups], dim=1) for name, piece in past.items()}
    shared = _through_operator(record, record.terms, target, by) if any(g.whole_heads for g in groups) else {}
    by_group = []
    for group in groups:
        own = shared if group.whole_heads else _through_operator(record, _reading(record.terms, group), target, by)
        by_group.append({name: put(piece, group.dims.any(1)) for name, piece in own.items()})
    return {name: torch.stack([own[name] for own in by_group], dim=1) for name in by_group[0]} | beside


def _through_operator(record: MixerRecord, terms: Terms, target: int, by: By) -> dict[str, Tensor]:
    """What the operator carries to the target, gated, `[b c h p]`."""
    row, gate = attention_rows(terms, [target]), record.gate[:, [target]]  # b h 1 s, b 1 h p
    if by == "source":
        return {"ssm": row[:, :, 0].mT[..., None] * terms.x * gate}
    rows = unified_rows(row, record.convolution, record.secant, gate)[:, 0]  # b s+1 h p
    return {"ssm": rows[:, :-1] * record.inputs, "ssm_bias": rows[:, -1:] * record.convolution.bias}


def _past_operator(record: MixerRecord, target: int, by: By) -> dict[str, Tensor]:
    """What the skip carries, gated, `[b c h p]`."""
    factor = record.gate[:, [target]] * record.skip
    if by == "source":
        return {"skip": factor * record.terms.x[:, [target]]}
    factor = factor * record.secant[:, [target]]
    reach = record.convolution.taps.shape[-1]
    read = record.convolution.lagged(record.inputs[:, max(0, target + 1 - reach) : target + 1])[:, -1]  # b h p k
    taps = (read * record.convolution.taps).movedim(-1, 1)  # b k h p
    return {"skip": factor * taps, "skip_bias": factor * record.convolution.bias}


def _reading(terms: Terms, group: Group) -> Terms:
    """The terms of a group's state dimensions alone: the others are not read."""
    B, C = (part.repeat_interleave(terms.heads // terms.groups, dim=2) for part in (terms.B, terms.C))  # b t h n
    return replace(terms, B=B, C=torch.where(group.dims, C, 0))


def check_by(by: str) -> None:
    if by not in ("source", "input"):
        raise FeatureError(
            f"by must be 'source' (what the operator reads) or 'input' (what the convolution before it reads), got "
            f"{by!r}"
        )


def tidy(
    parts: Mapping[str, Float[Tensor, "b r f c"]], layer: int, targets: Sequence[int], groups: Sequence[str]
) -> pd.DataFrame:
    """One number per batch row, target, part, group and position that the target can read, as a frame.

    Columns: row, layer, target, part, feature_group, source, value.
    """
    rows = [row for name, part in parts.items() for row in _rows(name, part, layer, targets, groups)]
    frame = pd.DataFrame(rows, columns=["row", "layer", "target", "part", "feature_group", "source", "value"])
    return frame.astype({"source": "Int64"})


def _rows(
    name: str, part: Tensor, layer: int, targets: Sequence[int], groups: Sequence[str]
) -> Iterator[tuple[Any, ...]]:
    names = groups if part.shape[2] == len(groups) and name != "out_bias" else [None]
    for row, by_target in enumerate(part.tolist()):
        for target, by_group in zip(targets, by_target, strict=True):
            for group, values in zip(names, by_group, strict=True):
                for column, value in enumerate(values):
                    source = {"ssm": column, "skip": target - column}.get(name)
                    if source is None or 0 <= source <= target:
                        yield row, layer, target, name, group, source, value
