"""What tells the features of an SSM layer apart: how slowly they forget, how far they look, how their step varies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import pad

from ssm_interp import plots
from ssm_interp.arguments import as_list
from ssm_interp.errors import FeatureError
from ssm_interp.features.arguments import same_columns, whole_number, whole_texts
from ssm_interp.features.groups import (
    DECAY_NORM,
    STATISTICS,
    check_attached,
    decay_norms,
    decay_rates,
    unknown_statistic,
)
from ssm_interp.hooks import Attachment, warn_hooked
from ssm_interp.hooks.active import active_edits
from ssm_interp.hooks.own import Watch, watching
from ssm_interp.results import Result
from ssm_interp.scan import Terms, distance_sums

BY_STATE = ("effective decay", "half-life")
SLAB = 2**22  # numbers of one temporary tensor


@dataclass(frozen=True, eq=False)
class Spectrum(Result):
    """Statistics of the features of every SSM layer, large where the memory is long (but for the steps).

    Attributes:
        model: its name.
        n_tokens: how many tokens stand behind the numbers, padding left out; 0: the weights alone.
        statistics: name -> layer -> a number per feature (a head, in Mamba-1 a channel), `[h]` in float64:
            "decay norm": `exp(-exp(A_log))`, what a unit step keeps of the state, as `decay_norms` gives it: the sum
            over the state dimensions (in Mamba-2 a head has one decay). Of the weights alone.
            "effective decay": the mean over tokens, and over state dimensions, of `exp(A dt)`, in [0, 1].
            "half-life": `ln 2 / (|A| mean dt)`, the tokens after which half of the state is left, at the mean of the
            rate |A| dt over tokens (the decay over many tokens is exp of their summed rates); of several state
            dimensions the geometric mean. Infinite where dt is always 0.
            "mean distance": `sum |M[t,s]| (t - s) / sum |M[t,s]|` over all edges of all texts, the effective receptive
            field in tokens. NaN for a feature whose M is zero.
            "mean dt": the mean over tokens of the step dt.
            "dt variation": the standard deviation of dt over tokens, divided by its mean: how much the input decides
            what is kept. NaN where dt is always 0.
        by_state: "effective decay" and "half-life" -> layer -> one number per feature and state dimension, `[h n]`
            (in Mamba-2 `[h 1]`).

    Example:
        >>> measured = spectrum(ssm, tokenizer("The capital of France is", return_tensors="pt"))      # doctest: +SKIP
        >>> measured["half-life"][3].median()                                                          # doctest: +SKIP
    """

    model: str
    n_tokens: int
    statistics: Mapping[str, Mapping[int, Float[Tensor, " h"]]]
    by_state: Mapping[str, Mapping[int, Float[Tensor, "h n"]]]

    def __getitem__(self, name: str) -> Mapping[int, Float[Tensor, " h"]]:
        if name not in list(self.statistics):
            raise FeatureError(_not_measured(name, self.statistics))
        return self.statistics[name]

    def __repr__(self) -> str:
        layers = list(next(iter(self.statistics.values())))
        return f"Spectrum({self.model}, layers {layers}, {self.n_tokens} tokens: {', '.join(self.statistics)})"

    @property
    def frame(self) -> pd.DataFrame:
        """A row per layer, feature and statistic: `model`, `layer`, `feature`, `statistic`, `value`."""
        parts = [
            pd.DataFrame(
                {
                    "model": self.model,
                    "layer": layer,
                    "feature": np.arange(len(values)),
                    "statistic": name,
                    "value": values.numpy(),
                }
            )
            for name, layers in self.statistics.items()
            for layer, values in layers.items()
        ]
        return pd.concat(parts, ignore_index=True)

    def quantiles(self, q: Sequence[float] = plots.QUANTILES) -> pd.DataFrame:
        """Over the features of each layer: `model`, `statistic`, `layer`, `quantile`, `value`; see `plots.quantiles`.

        Raises:
            PlotError: a quantile outside [0, 1], or none.
        """
        return plots.quantiles(self.frame, q)

    def plot(self) -> Figure:
        """The quantiles of every statistic over the layers; see `plots.spectrum_figure`."""
        read = f"measured on {self.n_tokens} tokens" if self.n_tokens else "measured on the weights alone"
        return plots.spectrum_figure(self.frame, title=read)


def spectrum(
    ssm: Attachment,
    inputs: Any = None,
    *,
    statistics: Sequence[str] | None = None,
    batch_size: int = 32,
    name: str | None = None,
) -> Spectrum:
    """Measure the decay spectrum of every SSM layer: on the weights, and on what the model reads.

    Texts are read without their padding, those of one length together: padding never counts, on whichever side it is.

    Args:
        ssm: an attached model.
        inputs: many texts or one: ids `[b t]`, the mapping that a tokenizer returns (`attention_mask` is 0 at padding),
            or a batch of prompts, as `prompts.pad` gives it. None: the weights alone.
        statistics: which ones, see `Spectrum`; None: all (without inputs, the decay norm).
        batch_size: texts per forward pass.
        name: the model's in tables; None: its `name_or_path`, or its class.

    Raises:
        FeatureError: a model without SSM layers; an unknown statistic (with the nearest name), or one that needs
            inputs; inputs that are no ids, a mask that is not theirs, that hides a whole text or has padding between
            tokens; a batch size below 1; edits at work; a detached
            attachment.

    Cost: a forward pass over the texts; for the mean distance O(L^2 H N) more per layer and text, O(L) memory, so leave
        it out for long ones. Nothing grows with the number of texts. Half precision is measured in fp32.
    Source: decay norm: Mamba Knockout (Endy et al., ACL 2025), section 5; mean distance: DeciMamba (Ben-Kish et al.,
        arXiv 2406.14528), section 3.2.

    Example:
        >>> measured = spectrum(ssm, tokenizer(texts, padding=True, return_tensors="pt"))               # doctest: +SKIP
        >>> measured.quantiles([0.5]).pivot(index="layer", columns="statistic", values="value")         # doctest: +SKIP
        >>> measured.plot().savefig("spectrum.png")                                                     # doctest: +SKIP
    """
    wanted = _wanted(ssm, inputs, statistics)
    batch_size = whole_number(batch_size, "batch_size")
    warn_hooked(ssm, "the spectrum")
    name = name or ssm.name
    norms = {DECAY_NORM: decay_norms(ssm)}
    if not set(wanted) - {DECAY_NORM}:
        return Spectrum(name, 0, norms, {})
    sums = {layer: _Sums(A, wanted) for layer, A in decay_rates(ssm).items()}
    watches = [
        Watch(points.point(operand), partial(sums[layer].take, operand))
        for layer, points in ssm.layers.items()
        for operand in ("dt", "B", "C")
    ]
    with torch.no_grad(), watching(watches):
        for texts in list(_texts(ssm, inputs, batch_size)):
            before = {layer: of_layer.tokens for layer, of_layer in sums.items()}
            ssm.run(texts)
            rows, length = texts["input_ids"].shape
            for layer, of_layer in sums.items():
                same_columns(layer, (of_layer.tokens - before[layer]) // rows, length)
    by_state = {layer: of_layer.by_state() for layer, of_layer in sums.items()}
    values = {layer: of_layer.statistics(by_state[layer]) for layer, of_layer in sums.items()}
    return Spectrum(
        name,
        next(iter(sums.values())).tokens,
        {
            statistic: norms.get(statistic)
            or {layer: by_statistic[statistic] for layer, by_statistic in values.items()}
            for statistic in wanted
        },
        {
            statistic: {layer: by_statistic[statistic] for layer, by_statistic in by_state.items()}
            for statistic in BY_STATE
            if statistic in wanted
        },
    )


class _Sums:
    """Sums over the tokens of one layer, [h] and [h n] in float64, from which its statistics follow."""

    def __init__(self, A: Float[Tensor, "h n"], wanted: Sequence[str]) -> None:
        self.A, self.wanted = A, wanted
        self.seen, self.mean, self.squares = torch.zeros(3, len(A), dtype=torch.float64)
        self.distance = torch.zeros(2, len(A), dtype=torch.float64)
        self.decay = torch.zeros_like(A)
        self.caught: dict[str, Tensor] = {}
        self.heads = slice(0, 0)

    @property
    def tokens(self) -> int:
        return int(self.seen[0])

    def take(self, name: str, tensor: Tensor) -> None:
        """What passes the points of dt, B and C, which fire in this order, once for each operator call."""
        self.caught[name] = tensor.detach()
        if name != "C":
            return
        dt, start = self.caught["dt"], self.heads.stop % len(self.A)
        self.heads = slice(start, start + dt.shape[2])  # Zamba calls once for each of its Mamba heads
        self._add_steps(dt.double().flatten(0, 1))
        if "mean distance" in self.wanted:
            self._add_distances(dt, self.caught["B"], self.caught["C"])
        self.caught = {}

    def _add_steps(self, dt: Float[Tensor, "k h"]) -> None:
        """Welford's sums, merged as Chan et al. do, which cancel no digits; and those of the decay."""
        heads, mean = self.heads, dt.mean(0)
        squares, moved = (dt - mean).square().sum(0).cpu(), mean.cpu() - self.mean[heads]
        seen = self.seen[heads]
        total = seen + len(dt)
        self.squares[heads] += squares + moved.square() * seen * len(dt) / total
        self.mean[heads] += moved * len(dt) / total
        self.seen[heads] = total
        if "effective decay" in self.wanted:
            A = self.A[heads].to(dt.device)
            for part in torch.split(dt, max(1, SLAB // A.numel())):
                self.decay[heads] += (part[..., None] * A).exp().sum(0).cpu()

    def _add_distances(self, dt: Tensor, B: Tensor, C: Tensor) -> None:
        dtype = torch.promote_types(dt.dtype, torch.float32)
        A = self.A[self.heads].to(dt)
        terms = Terms(*(part.to(dtype) for part in (dt[..., None], dt, A, B, C)))  # x is not looked at
        self.distance[:, self.heads] += torch.stack(distance_sums(terms)).double().sum(1).cpu()

    def by_state(self) -> dict[str, Float[Tensor, "h n"]]:
        rate = self.A.abs() * self.mean[:, None]
        return {"effective decay": self.decay / self.seen[:, None], "half-life": math.log(2) / rate}

    def statistics(self, by_state: Mapping[str, Float[Tensor, "h n"]]) -> dict[str, Float[Tensor, " h"]]:
        weighted, total = self.distance
        return {
            "effective decay": by_state["effective decay"].mean(1),
            "half-life": by_state["half-life"].log().mean(1).exp(),
            "mean distance": weighted / total,
            "mean dt": self.mean,
            "dt variation": (self.squares / self.seen).sqrt() / self.mean,
        }


def _wanted(ssm: Attachment, inputs: Any, statistics: Sequence[str] | None) -> tuple[str, ...]:
    """The statistics to measure, in the order of `STATISTICS`."""
    check_attached(ssm)
    if not ssm.is_attached:
        raise FeatureError("this attachment was detached; call attach(model) again")
    if not ssm.layers:
        raise FeatureError(f"{type(ssm.model).__name__} has no SSM layers, whose features a spectrum is of")
    if any(active_edits(module) for module in ssm.modules_of()):
        raise FeatureError("a spectrum is of the model as it is: leave the block of `with ssm.edit(...)` first")
    wanted = (STATISTICS if inputs is not None else STATISTICS[:1]) if statistics is None else as_list(statistics)
    if wrong := [name for name in wanted if not isinstance(name, str)]:
        raise FeatureError(f"statistics are asked for by name, {', '.join(STATISTICS)}; got {wrong[0]!r:.200}")
    if not wanted:
        raise FeatureError(f"no statistic was asked for; there are {', '.join(STATISTICS)}")
    for name in wanted:
        if name not in STATISTICS:
            raise FeatureError(unknown_statistic(name, STATISTICS))
        if inputs is None and name != DECAY_NORM:
            raise FeatureError(f"the {name} depends on what the model reads; give spectrum(ssm, inputs)")
    return tuple(name for name in STATISTICS if name in wanted)


def _texts(ssm: Attachment, inputs: Any, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """The texts without padding, those of one length together, as many as go through the model at once."""
    given, real = whole_texts(ssm, inputs)
    given.pop("attention_mask", None)
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) or tensor.shape != real.shape:
            got = str(list(tensor.shape)) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise FeatureError(f"{name} must be a tensor with a number per token, {list(real.shape)}, got {got}")
    lengths = real.sum(1)
    begins = real & ~pad(real, (1, 0))[:, :-1]
    if (broken := (begins.sum(1) > 1).nonzero()).numel():
        raise FeatureError(
            f"row {int(broken[0])} of attention_mask has padding between tokens, where distances mean nothing; pad on "
            "the left or on the right"
        )
    for length in sorted(set(lengths.tolist())):
        for rows in torch.split((lengths == length).nonzero()[:, 0], batch_size):
            yield {name: tensor[rows][real[rows]].view(len(rows), length) for name, tensor in given.items()}


def _not_measured(name: str, measured: Mapping[str, Any]) -> str:
    if name not in STATISTICS:
        return unknown_statistic(str(name), STATISTICS)
    return f"the {name} was not measured, only {', '.join(measured)}; give spectrum(ssm, inputs, statistics=[...])"
