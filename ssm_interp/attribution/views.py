"""The attention of an SSM layer in the forms that are called so, reduced over channels, and rolled out over layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from einops import rearrange, reduce
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from ssm_interp import plots
from ssm_interp.attribution.mixers import MixerRecord, precisely, run_recorded, run_terms
from ssm_interp.errors import FeatureError
from ssm_interp.features.arguments import chosen_layers, columns, indices, row_of, row_tokens, whole_texts
from ssm_interp.hooks import Attachment
from ssm_interp.results import ByLayer, Result, Tokens, labels, with_tokens
from ssm_interp.scan import Terms, attention, attention_rows, reduced_attention
from ssm_interp.scan.attention import MEASURES, Reduction
from ssm_interp.scan.blocks import SLAB_BYTES
from ssm_interp.scan.unified import Convolution, unified_rows

Form = Literal["operator", "no_dt", "value", "unified"]

FORMS = ("operator", "no_dt", "value", "unified")
LABELS: Mapping[Form, str] = {
    "operator": "attention M[t,s] of the SSM",
    "no_dt": "C (decay) B of the SSM",
    "value": "value-weighted attention |M[t,s]| |x_s|",
    "unified": "attention of the whole mixer (unified)",
}
REDUCED: Mapping[Reduction, str] = {
    "mean": "Mean",
    "mean_abs": "Mean of the magnitude",
    "norm": "Root of the sum of squares",
}


@dataclass(frozen=True, eq=False, repr=False)
class AttentionView(Result):
    """The attention of one layer in one form. A row is a target t, a column a source s; above the diagonal it is zero.

    Attributes:
        layer: index of the layer in the model.
        form: what an entry means, and what its column is multiplied by in the layer, per channel:
            "operator": M, dt_s folded in: y_t = sum_s M[t,s] x_s.
            "no_dt": the attention-like form C_t (decay) B_s, nearest to a query times a key; its values are dt_s x_s.
            "value": |M[t,s]| |x_s|, the length of the term itself (over head_dim); never negative.
            "unified": convolution, operator, skip and gate in one, of the convolution's inputs at s (not of x_s). It
                gives what enters the output projection, exactly, with `bias` for the convolution's bias.
        reduction: over channels: "mean" (signs kept, so that channels cancel), "mean_abs", "norm" (root of the sum of
            squares), or None.
        targets: the position of each row.
        values: `[b r s]`; with reduction None `[b c r s]`. c counts heads (in Mamba-1 they are channels), and in the
            unified form channels, `h p` flattened.
        bias: in the unified form the convolution's bias, as one more column, `[b r]` or `[b c r]`; else None.
        model: its name.
        tokens: a readable token per column of the ids, row by row; None: not known.

    Example:
        >>> view = attention_views(ssm, inputs, "unified", layers=[3])[3]                  # doctest: +SKIP
        >>> view.plot().savefig("unified.png")                                       # doctest: +SKIP
    """

    layer: int
    form: Form
    reduction: Reduction | None
    targets: tuple[int, ...]
    values: Float[Tensor, "b *c r s"]
    bias: Float[Tensor, "b *c r"] | None
    model: str
    tokens: Tokens | None = None

    @property
    def frame(self) -> pd.DataFrame:
        """A row per batch row, (channel,) target and source that it can read, padding (zero) included.

        Columns: row, layer, channel (with no reduction: the place among the channels that were asked for), target,
        source, attention, and where the tokens are known, target_token and source_token. In the unified form the bias's
        column has no source.
        """
        values = self.values if self.reduction is None else self.values[:, None]  # b c r s
        sources = np.arange(values.shape[-1])
        readable = np.broadcast_to(sources <= np.array(self.targets)[:, None], values.shape)
        row, channel, index, source = readable.nonzero()
        columns = {"row": row, "channel": channel, "target": np.array(self.targets)[index], "source": source}
        table = pd.DataFrame(columns).assign(attention=values.cpu().numpy()[row, channel, index, source])
        if self.bias is not None:
            bias = (self.bias if self.reduction is None else self.bias[:, None]).cpu().numpy()  # b c r
            row, channel, index = np.ones(bias.shape).nonzero()
            columns = {"row": row, "channel": channel, "target": np.array(self.targets)[index]}
            table = pd.concat([table, pd.DataFrame(columns).assign(attention=bias.ravel())], ignore_index=True)
        table = table.astype({"source": "Int64"})
        table.insert(1, "layer", self.layer)
        return with_tokens(table if self.reduction is None else table.drop(columns="channel"), self.tokens)

    def plot(self, *, row: int = 0, **options: Any) -> Figure:
        """Heat map of a row of the batch: `plots.attention_figure`.

        Args:
            row: which row.
            options: as of `attention_figure`: title, in place of the model and the layer; label, in place of what an
                entry is; ax.

        Raises:
            FeatureError: all channels apart, or not all targets; no such row.

        Example:
            >>> attention_views(ssm, inputs, "value")[3].plot().savefig("value.png")  # doctest: +SKIP
        """
        matrix, tokens, options = self._chosen(row, options)
        return plots.attention_figure(matrix, tokens, **options)

    def page(self, *, row: int = 0, **options: Any) -> str:
        """The same as an interactive page of HTML: `plots.attention_page`. Args and errors are those of `plot`."""
        matrix, tokens, options = self._chosen(row, options)
        return plots.attention_page(matrix, tokens, **options)

    def _chosen(
        self, row: int, options: Mapping[str, Any]
    ) -> tuple[Float[Tensor, "t s"], Sequence[str], dict[str, Any]]:
        """What is drawn of a batch: a row's matrix, its tokens, and how."""
        *batch, targets, sources = self.values.shape
        if self.reduction is None or targets != sources:
            raise FeatureError(
                f"a heat map needs [b t s] with t = s, this view has {list(self.values.shape)}; ask for all targets, "
                "and for a reduction ('mean', 'mean_abs', 'norm')"
            )
        row = row_of(row, batch[0])
        over = "channels" if self.form == "unified" else "heads"
        defaults = {
            "title": f"{plots.short(self.model)}, layer {self.layer}\n{LABELS[self.form]}",
            "label": f"{REDUCED[self.reduction]} over {over}",
        }
        return self.values[row], labels(self.tokens, row, sources), defaults | dict(options)


@dataclass(frozen=True, eq=False, repr=False)
class AttentionViews(ByLayer[AttentionView]):
    """Layer -> its view.

    Example:
        >>> attention_views(ssm, inputs, layers=[1, 2]).plot().savefig("attention.png")    # doctest: +SKIP
    """

    holds = (AttentionView,)

    def plot(self, *, row: int = 0) -> Figure:
        """A heat map per layer, each with a scale of its own; see `AttentionView.plot`."""
        figure, panels = plots.attention_panels(len(self), next(iter(self.values())).values.shape[-1])
        for axes, view in zip(panels, self.values(), strict=True):
            view.plot(row=row, ax=axes)
        return figure


def attention_views(
    ssm: Attachment,
    inputs: Any,
    form: Form = "operator",
    *,
    reduction: Reduction | None = "mean_abs",
    layers: Any = None,
    targets: Any = None,
    heads: Any = None,
    tokens: Any = None,
) -> AttentionViews:
    """The attention of SSM layers as a matrix; see `AttentionView` for the forms and for what an entry means.

    Args:
        ssm: an attached model.
        inputs: ids `[b t]`, the mapping of a tokenizer, or a batch of prompts.
        form: "operator", "no_dt", "value" or "unified".
        reduction: "mean", "mean_abs", "norm", or None for all channels apart.
        layers: SSM layers, one or a sequence; None: all.
        targets: rows, one position or a sequence; None: all. A few are much cheaper than all.
        heads: those to look at, one or a sequence, or layer -> those; None: all.
        tokens: a readable token per column of the ids, or such a sequence per row, for tables and pictures; None: those
            of a batch of prompts, else none.

    Returns:
        Layer -> its view. Padding is zero, as rows and as columns (but for the unified columns of left padding where
        the input projection has a bias, which the host's convolution then reads).

    Raises:
        FeatureError: an unknown form, reduction, layer or head; no heads; targets outside the prompt or in padding;
            tokens of another number than the columns; and as `record_mixers`.

    Cost: one forward, and per layer what `scan.attention` (all rows) or `scan.attention_rows` cost; the unified form
        O(L² H P K) more, or O(L H P K) a row. Reduced, memory is O(L²) and a slab of heads.
    Source: Ali et al. (arXiv 2403.01590) section 3 for the operator form; Zimerman et al. (arXiv 2405.16504) for the
        unified one, here with D and the bias's column; value weighting after Kobayashi et al. (EMNLP 2020).

    Example:
        >>> views = attention_views(ssm, inputs, "value", targets=-1)                      # doctest: +SKIP
        >>> views[3].values[0, 0]            # how much the last token reads from each       # doctest: +SKIP
    """
    if form not in FORMS:
        raise FeatureError(f"there is no form {form!r} of attention; there are {', '.join(FORMS)}")
    if reduction not in (None, *MEASURES):
        raise FeatureError(f"reduction must be one of {', '.join(MEASURES)}, or None, got {reduction!r}")
    chosen = chosen_layers(ssm, layers)
    looked_at = {layer: _heads(ssm, layer, heads) for layer in chosen}
    given, mask = whole_texts(ssm, inputs)
    rows, named = None if targets is None else columns(targets, mask), row_tokens(tokens, inputs, mask)
    read = tuple(rows or range(mask.shape[1]))
    views, bias = {}, None
    layers_read = run_recorded(ssm, given, chosen)[1] if form == "unified" else run_terms(ssm, given, chosen)
    for layer, kept in layers_read.items():
        with precisely(given["input_ids"].device):
            if isinstance(kept, MixerRecord):
                values = _of_mixer(kept, looked_at[layer], rows, reduction)
                values, bias = values[..., :-1], values[..., -1]
            else:
                values = _of_operator(kept, form, looked_at[layer], rows, reduction)
        views[layer] = AttentionView(layer, form, reduction, read, values, bias, ssm.name, named)
    return AttentionViews(views)


def rollout(matrices: Sequence[Float[Tensor, "b t s"]], *, residual: float = 0.5) -> Float[Tensor, "b t s"]:
    """How attention of several layers, first layer first, adds up from the first layer's inputs to the last's outputs.

    Each matrix is normalised to rows that sum to 1, mixed with the identity for the residual stream,
    `residual I + (1 - residual) A`, and they are multiplied. Rows of zeros (padding) stay with themselves.

    Args:
        matrices: not negative, `[b t s]` each: views by "mean_abs" or "norm", of any form; or anything of that shape,
            such as `decomposition.by_position().sum(2).norm(dim=-1)` for all targets. Layers that are left out (the
            attention layers of a hybrid model) count as if they moved nothing.
        residual: the residual stream's share, from 0 to 1.

    Returns:
        `[b t s]`: the share of position s's input in position t's output; rows sum to 1.

    Raises:
        FeatureError: no matrices; not square, of different shapes, negative or not finite; a share outside 0 to 1.

    Cost: O(layers L^3).
    Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers (ACL 2020).

    Example:
        >>> rollout([torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])])
        tensor([[[1.0000, 0.0000],
                 [0.5000, 0.5000]]])
    """
    if not isinstance(residual, int | float) or not 0 <= residual <= 1:
        raise FeatureError(f"residual is the share of the residual stream, from 0 to 1, got {residual!r}")
    if not isinstance(matrices, Sequence) or not len(matrices):
        raise FeatureError(
            "a rollout takes a list with the matrix of at least one layer, first layer first, got "
            f"{type(matrices).__name__}; of views: [view.values for view in views.values()]"
        )
    for index, matrix in enumerate(matrices):
        if not isinstance(matrix, Tensor) or matrix.ndim != 3 or not matrix.is_floating_point():
            got = f"{matrix.dtype} {list(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
            raise FeatureError(
                f"matrix {index} must be numbers [b t s], such as the `values` of an AttentionView with a reduction, "
                f"got {got}"
            )
    shape = matrices[0].shape
    identity = torch.eye(shape[-1], dtype=matrices[0].dtype, device=matrices[0].device)
    mixed = identity.expand(shape[0], -1, -1)
    for index, matrix in enumerate(matrices):
        if matrix.shape != shape or shape[1] != shape[2]:
            raise FeatureError(f"matrices must all be [b t s] with t = s, got {list(shape)} and {list(matrix.shape)}")
        if not (matrix.isfinite() & (matrix >= 0)).all():
            raise FeatureError(
                f"matrix {index} has entries that are negative or not finite, which cannot be shares; reduce by "
                "'mean_abs' or 'norm'"
            )
        total = matrix.sum(-1, keepdim=True)
        shares = torch.where(total > 0, matrix / torch.where(total > 0, total, 1), identity)
        mixed = (residual * identity + (1 - residual) * shares) @ mixed
    return mixed


def _heads(ssm: Attachment, layer: int, heads: Any) -> list[int]:
    if isinstance(heads, Mapping) and not heads.keys() <= ssm.layers.keys():
        raise FeatureError(f"heads names layers {list(heads)}; the SSM layers of this model are {list(ssm.layers)}")
    chosen, count = heads.get(layer, ()) if isinstance(heads, Mapping) else heads, ssm.layers[layer].heads
    numbers = list(range(count) if chosen is None else indices(chosen, f"layer {layer}: heads"))
    if len(set(numbers)) < len(numbers):
        raise FeatureError(f"layer {layer}: heads must be named once each, got {numbers}")
    if wrong := [head for head in numbers if not 0 <= head < count]:
        raise FeatureError(f"layer {layer} has no head {wrong[0]}; it has heads 0 to {count - 1}")
    return numbers


def _of_operator(
    terms: Terms, form: Form, heads: list[int], rows: list[int] | None, reduction: Reduction | None
) -> Float[Tensor, "b *c r s"]:
    """M, C (decay) B or |M| |x|: `[b r s]`, or of each head, `[b h r s]`."""
    lengths = torch.linalg.vector_norm(terms.x, dim=-1)  # b s h
    if rows is None and reduction is not None:
        steps = {"no_dt": torch.ones_like(terms.dt), "value": terms.dt * lengths}.get(form)
        signless: Reduction = "mean_abs" if form == "value" and reduction == "mean" else reduction
        return reduced_attention(terms, signless, heads=None if len(heads) == terms.heads else heads, steps=steps)
    matrix = torch.cat([part for _, part in _matrices(terms, heads, rows, fold_dt=form != "no_dt")], dim=1)
    matrix = matrix[:, _order(heads)]
    if form == "value":
        matrix = matrix.abs() * rearrange(lengths[:, :, heads], "b s h -> b h 1 s")
    return matrix if reduction is None else _reduced(MEASURES[reduction](matrix).sum(1), reduction, len(heads))


def _of_mixer(
    record: MixerRecord, heads: list[int], rows: list[int] | None, reduction: Reduction | None
) -> Float[Tensor, "b *c r s_and_bias"]:
    """The unified form: `[b r s+1]`, or of each channel, `[b (h p) r s+1]`."""
    targets = list(range(record.terms.length)) if rows is None else rows
    by_slab = (_unified(record, *part, targets) for part in _matrices(record.terms, heads, rows))
    if reduction is None:
        channels = torch.cat([torch.cat(list(parts), dim=2) for parts in by_slab], dim=1)
        by_head = rearrange(channels, "b (h p) r s -> b h p r s", h=len(heads))[:, _order(heads)]
        return rearrange(by_head, "b h p r s -> b (h p) r s")
    sums = (torch.cat([MEASURES[reduction](part).sum(1) for part in parts], dim=1) for parts in by_slab)
    return _reduced(sum(sums, record.y.new_zeros(())), reduction, len(heads) * record.terms.head_dim)


def _reduced(total: Float[Tensor, "b r s"], reduction: Reduction, channels: int) -> Float[Tensor, "b r s"]:
    return total.sqrt() if reduction == "norm" else total / channels


def _order(heads: list[int]) -> list[int]:
    """Where each head is among the ascending ones."""
    ascending = sorted(heads)
    return [ascending.index(head) for head in heads]


def _matrices(
    terms: Terms, heads: list[int], rows: list[int] | None, fold_dt: bool = True
) -> Iterator[tuple[list[int], Float[Tensor, "b h r s"]]]:
    """Some heads and their matrices, ascending: all at once for chosen rows, else in slabs."""
    ascending = sorted(heads)
    if rows is not None:
        yield ascending, attention_rows(terms, rows, fold_dt=fold_dt)[:, ascending]
        return
    size = max(1, SLAB_BYTES // (terms.x.element_size() * terms.batch * terms.length**2))
    for start in range(0, len(ascending), size):
        for members, part in terms.of_heads(ascending[start : start + size]):
            yield members, attention(part, fold_dt=fold_dt)


def _unified(
    record: MixerRecord, heads: list[int], matrix: Float[Tensor, "b h r s"], targets: list[int]
) -> Iterator[Float[Tensor, "b hp r s_and_bias"]]:
    """The unified form of some heads, a few rows at a time where there are many channels."""
    skip = torch.zeros_like(matrix)
    skip[:, :, range(len(targets)), targets] = record.skip[heads]
    convolution = Convolution(*(part[heads] for part in record.convolution))
    secant, gate = record.secant[:, :, heads], record.gate[:, :, heads][:, targets]
    read = reduce(record.inputs != 0, "b s h p -> b 1 s 1 1", "any")  # blank at padding, whose column is then zero
    size = max(1, SLAB_BYTES // (secant.element_size() * secant.numel()))
    for start in range(0, len(targets), size):
        some = slice(start, start + size)
        rows = unified_rows((matrix + skip)[:, :, some], convolution, secant, gate[:, some])  # b r s+1 h p
        rows[:, :, :-1] *= read
        yield rearrange(rows, "b r s h p -> b (h p) r s")
