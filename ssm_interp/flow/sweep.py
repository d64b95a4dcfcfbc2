"""The sweep: one knockout per window, feature group, source and target role, over many prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from ssm_interp.errors import FeatureError, FlowError, NothingAnswered, PromptError
from ssm_interp.experiments.values import Align
from ssm_interp.features import feature_groups
from ssm_interp.flow.metrics import changes
from ssm_interp.flow.named_edges import check_edges_exist, edge_count
from ssm_interp.flow.result import FlowResult, FlowRun
from ssm_interp.flow.windows import Window, default_size
from ssm_interp.flow.windows import windows as windows_over
from ssm_interp.hooks import Answers, Attachment, Knockout, Metric, answers, warn_hooked
from ssm_interp.hooks.rows.answers import By
from ssm_interp.hooks.rows.asked import device_of
from ssm_interp.hooks.rows.metrics import names_of
from ssm_interp.prompts import Batch, Prompt, TokenizedPrompt, check_role, pad, tokenize, warn_shared
from ssm_interp.words import ALL

Progress = Callable[[int, int], None]
FeatureGroups = Mapping[str, Mapping[int, Sequence[int] | Sequence[tuple[int, int]]] | None]
"""Name -> per layer the features that the knockout is restricted to; None: all of them."""


def sweep(
    ssm: Attachment,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    sources: Sequence[str | int] = ("subject", "relation", "first", "last"),
    targets: Sequence[str] = ("last",),
    windows: int | Sequence[int] | None = None,
    align: Align = "left",
    features: FeatureGroups | Sequence[str] | None = None,
    through: str | Sequence[str] | None = None,
    answered_only: bool = True,
    full_answer: bool = False,
    allow_no_edges: bool = False,
    batch_size: int = 32,
    max_memory: int | None = None,
    metric: str | Metric | None = None,
    by: By = "auto",
    progress: Progress | None = None,
    name: str | None = None,
    revision: str = "",
) -> FlowResult:
    """Knock out each source -> target in every layer window, for the prompts that the model answers correctly.

    Args:
        ssm: an attached model, in eval mode.
        tokenizer: the model's own; a fast one.
        prompts: with distinct ids (or texts).
        sources: roles whose writings are no longer read, see `ssm_interp.prompts.ROLES`, or positions in the prompt
            (0 is its first token; a prompt that is too short has no such edges).
        targets: roles that no longer read them.
        windows: layers per window, one size or several; None: three in eight of the layers, as `default_size` gives.
        align: `"left"` (never truncated, drawn at its first layer) or `"centre"` (truncated, drawn at its centre).
        features: feature groups, each a knockout of its own: names as `features.feature_groups` takes them, or name ->
            layer -> features; None: one of all features, named "all".
        through: the streams in which edges are removed: "ssm", "conv", "attention", or several; None: "ssm" where the
            model has SSM layers, else "attention". Windows run over the layers that have one of them.
        answered_only: leave out the prompts whose answer is not the model's most likely next token.
        full_answer: score every token of the answer (the product of their probabilities, each given the right ones
            before it; answered correctly: each the most likely), not the first one alone. The edges knocked out are
            those of the prompt all the same. Takes a full forward pass per knockout.
        allow_no_edges: whether knockouts may all be without any edge in these prompts, and change nothing: where the
            prompts are a part of more.
        batch_size: prompts per forward pass; prompts of similar length go together.
        max_memory: bytes that the rows of a step may take; None: a quarter of what is free.
        metric: what is measured besides the answer's probability, in columns of its own: a name, or a function of the
            logits, as `answers` takes it.
        by: "rows" or "forwards" instead of what is best; `FlowRun.engine` says how it was done and why, see `answers`.
        progress: called with (done, total), counted in answers: prompts x knockouts.
        name: the model's name in the result; None: its `name_or_path`, or its class.
        revision: of the model, for the table; "": what its config knows.

    Raises:
        PromptError: an unknown role; prompts with the same id; a prompt that this tokenizer cannot tokenize as asked.
        FlowError: no prompts; no role; no prompt answered correctly; a window that does not fit; a batch size below 1;
            a model in training mode.
        MetricError: logits that are not numbers; a metric that there is not, or that is no finite number per prompt.
        NoEdgesError: no prompt has any of the edges source -> target (a kind of FlowError).
        FeatureError: a feature group that names no features for a layer.
        InterventionError: a stream or a feature that the model does not have.

    Warns:
        SharedTokenWarning: prompts ask for a first token with which the answers of others begin too.
        NoEdgesWarning: some knockouts have no edges in any prompt, though others have.
        HookedWarning: hooks are on hook points; which prompts are kept, and every number, is found under them.

    Cost: about one forward pass per prompt and one token per knockout; see `answers`.
    Source: Mamba Knockout (Endy et al., ACL 2025), section 3.

    Example:
        >>> model, tokenizer = si.load("tiny-mamba1")                   # doctest: +SKIP
        >>> with si.attach(model) as ssm:                               # doctest: +SKIP
        ...     result = sweep(ssm, tokenizer, load_prompts()[:100])
        >>> result.plot().savefig("flow.png")                           # doctest: +SKIP
    """
    _check_types(ssm, prompts)
    layers = ssm.layers_with(through)
    sizes = _sizes(windows, layers)
    placed = [window for size in sizes for window in windows_over(layers, size, align)]
    _check(ssm.model, sources, targets, batch_size)
    named = features if features is None or isinstance(features, Mapping) else feature_groups(ssm, features)
    groups = _groups(named, layers)
    variants = [
        Variant(
            Knockout(sources=str(source), targets=target, layers=window.layers, features=group, through=through),
            window,
            _per_layer(chosen, window),
        )
        for target in dict.fromkeys(targets)
        for source in dict.fromkeys(sources)
        for group, chosen in groups.items()
        for window in placed
    ]
    asked = _tokenized(prompts, tokenizer, full_answer)
    warn_hooked(ssm, "the sweep")
    if not allow_no_edges:
        check_edges_exist(asked, sources, targets)
    if not full_answer:
        warn_shared(asked)
    run = _Run(ssm, metric, full_answer, by, batch_size, max_memory, progress)
    kept = run.answered(asked, per_kept=1 + len(variants)) if answered_only else run.all_of(asked, 1 + len(variants))
    if not kept:
        raise NothingAnswered(len(asked), full_answer=full_answer)
    if not allow_no_edges:
        check_edges_exist(kept, sources, targets, warn=False)
    config = getattr(ssm.model, "config", None)
    model = name or ssm.name
    frame = run.knocked_out(kept, variants)
    answers = [row.prompt.answer if full_answer else row.asked for row in kept]
    frame.insert(1, "answer", answers * len(variants))
    frame.insert(2, "unasked", [0 if full_answer else len(row.answer_ids) - 1 for row in kept] * len(variants))
    frame.insert(3, "model", model)
    frame.insert(4, "revision", revision or getattr(config, "_commit_hash", None) or "")
    return FlowResult(frame, (FlowRun(model, layers, sizes, align, len(asked), len(kept), run.how, full_answer),))


@dataclass(frozen=True)
class Variant:
    """One knockout of a sweep.

    Attributes:
        knockout: the edges, by roles, layers, and the name of a feature group.
        window: where it stands among the windows.
        features: layer -> the features of that group; None: all of them.
    """

    knockout: Knockout
    window: Window
    features: Mapping[int, Any] | None

    @property
    def source(self) -> str:
        """The role, or the position as a text, that is no longer read."""
        (role,) = self.knockout.sources  # type: ignore[misc]
        return str(role)

    @property
    def target(self) -> str:
        """The role that no longer reads it."""
        (role,) = self.knockout.targets  # type: ignore[misc]
        return str(role)

    @property
    def interventions(self) -> tuple[Knockout, ...]:
        """What it does: one knockout for the window, or one per layer where features are chosen."""
        if self.features is None:
            return (self.knockout.replace(features=None),)
        return tuple(
            self.knockout.replace(layers=layer, features=features) for layer, features in self.features.items()
        )


def _per_layer(features: Mapping[int, Any] | None, window: Window) -> Mapping[int, Any] | None:
    return None if features is None else {layer: features[layer] for layer in window.layers}


def _check_types(ssm: Any, prompts: Any) -> None:
    if not isinstance(ssm, Attachment):
        raise FlowError(f"a sweep takes an attachment, got {type(ssm).__name__}; write `with attach(model) as ssm:`")
    if isinstance(prompts, Prompt | str) or not all(isinstance(prompt, Prompt) for prompt in prompts):
        raise FlowError(
            "a sweep takes a sequence of prompts, as load_prompts gives, or [Prompt(text, subject, answer)]"
        )


def _sizes(windows: int | Sequence[int] | None, layers: tuple[int, ...]) -> tuple[int, ...]:
    if windows is None:
        return (default_size(layers),)
    sizes = (windows,) if isinstance(windows, int) else tuple(dict.fromkeys(windows))
    if not sizes:
        raise FlowError("no window size was given; give the number of layers in a window, or several such numbers")
    return sizes


def _groups(features: FeatureGroups | None, layers: tuple[int, ...]) -> Mapping[str, Any]:
    if features is None:
        return {ALL: None}
    if not features:
        raise FlowError("no feature group was given; None means one group of all features")
    check_complete(features, layers)
    return features


def check_complete(groups: FeatureGroups, layers: Sequence[int]) -> None:
    """Raise FeatureError if a feature group names no features for one of the layers that windows run over."""
    for name, chosen in groups.items():
        if chosen is not None and (missing := [layer for layer in layers if layer not in chosen]):
            raise FeatureError(
                f"the feature group {name!r} names no features for layer {missing[0]}; give some for each"
            )


def _check(model: nn.Module, sources: Sequence[str | int], targets: Sequence[str], batch_size: int) -> None:
    for kind, roles in (("sources", sources), ("targets", targets)):
        if isinstance(roles, str) or not roles:
            raise FlowError(f"{kind} must be a sequence of at least one role, such as ('last',), got {roles!r}")
        for role in roles:
            if isinstance(role, str):
                check_role(role)
            elif role < 0 or kind == "targets":
                raise FlowError(f"{kind} names position {role}; only sources can be positions, which count from 0")
    if batch_size < 1:
        raise FlowError(f"the batch size must be at least 1, got {batch_size}")
    if model.training:
        raise FlowError(f"{type(model).__name__} is in training mode; call .eval() on it first")


def _tokenized(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, full_answer: bool
) -> list[TokenizedPrompt]:
    if not prompts:
        raise FlowError("a sweep needs at least one prompt, got none")
    check_distinct(prompts)
    return [tokenize(prompt, tokenizer, full_answer=full_answer) for prompt in prompts]


def check_distinct(prompts: Sequence[Prompt]) -> None:
    """Raise PromptError if prompts share an id (or, where they have none, a text)."""
    times = Counter(_id(prompt) for prompt in prompts)
    if twice := [name for name, count in times.items() if count > 1]:
        raise PromptError(f"prompts must have distinct ids; these occur more than once: {', '.join(twice[:5])}")


def _id(prompt: Prompt) -> str:
    return prompt.id or prompt.text


class _Run:
    """Batches of prompts, asked under every variant, with a count of what is done."""

    def __init__(
        self,
        ssm: Attachment,
        metric: str | Metric | None,
        full_answer: bool,
        by: By,
        batch_size: int,
        max_memory: int | None,
        progress: Progress | None,
    ) -> None:
        self.ssm, self.metric, self.full_answer, self.by = ssm, metric, full_answer, by
        self.batch_size, self.max_memory, self.progress = batch_size, max_memory, progress
        self.done = self.total = 0
        self.how = ""

    def answered(self, prompts: list[TokenizedPrompt], per_kept: int) -> list[TokenizedPrompt]:
        """The prompts whose answer is most likely, in their order; maybe none."""
        self.total = len(prompts)
        right: set[int] = set()
        for indices, batch in self._batches(prompts):
            hit = self._answers(batch, [()], ["accuracy", "log_probability"], by="forwards").values[0, 0]
            right |= {index for index, is_hit in zip(indices, hit.tolist(), strict=True) if is_hit}
        self.total += per_kept * len(right)
        return [prompt for index, prompt in enumerate(prompts) if index in right]

    def all_of(self, prompts: list[TokenizedPrompt], per_kept: int) -> list[TokenizedPrompt]:
        """The prompts, whatever the model answers."""
        self.total = per_kept * len(prompts)
        return prompts

    def knocked_out(self, prompts: list[TokenizedPrompt], variants: list[Variant]) -> pd.DataFrame:
        """One row per variant and prompt, sorted so.

        The answers go into arrays made once: small pieces kept from every batch would lie between the large tensors of
        the next ones, and the process would grow with the number of prompts.
        """
        metrics = ["log_probability", "accuracy", *([] if self.metric is None else [self.metric])]
        values = np.empty((len(metrics), 1 + len(variants), len(prompts)))
        n_edges = np.empty((len(variants), len(prompts)), dtype=np.int64)
        interventions = [(), *(variant.interventions for variant in variants)]
        for indices, batch in self._batches(prompts):
            answered = self._answers(batch, interventions, metrics, by=self.by)
            values[:, :, indices], self.how = answered.values.numpy(), answered.how
            n_edges[:, indices] = _edges(batch, variants)
        logprob, hit, *more = values
        columns = changes(logprob[1:], logprob[:1]) | {"hit": hit[1:] > 0}
        for value in more:
            (named,) = names_of(metrics[2:])
            columns |= {"metric": np.full(value[1:].shape, named, dtype=object)}
            columns |= {"value_base": np.broadcast_to(value[:1], value[1:].shape), "value": value[1:]}
        flat = {key: value.ravel() for key, value in columns.items()}
        return _labels(prompts, variants).assign(n_edges=n_edges.ravel(), **flat)

    def _batches(self, prompts: list[TokenizedPrompt]) -> Iterator[tuple[list[int], Batch]]:
        device = device_of(self.ssm.model)
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(prompts), self.batch_size):
            indices = by_length[start : start + self.batch_size]
            yield indices, pad([prompts[index] for index in indices]).to(device)

    def _answers(
        self, batch: Batch, variants: Sequence[Sequence[Knockout]], metrics: Sequence[str | Metric], by: By
    ) -> Answers:
        return answers(
            self.ssm,
            batch,
            variants,
            metrics,
            full_answer=self.full_answer,
            by=by,
            allow_no_edges=True,
            batch_size=max(self.batch_size, len(batch.prompts)),
            max_memory=self.max_memory,
            progress=self._report,
        )

    def _report(self, count: int) -> None:
        self.done += count
        if self.progress:
            self.progress(self.done, self.total)


def _edges(batch: Batch, variants: Sequence[Variant]) -> list[list[int]]:
    """How many edges each variant removes in each row."""
    pairs = [(variant.source, variant.target) for variant in variants]
    counts = {pair: [edge_count(row, *pair) for row in batch.prompts] for pair in dict.fromkeys(pairs)}
    return [counts[pair] for pair in pairs]


def _labels(prompts: Sequence[TokenizedPrompt], variants: Sequence[Variant]) -> pd.DataFrame:
    """What stands in front of the numbers: a row per variant and prompt."""
    columns: dict[str, list[Any]] = {
        "source": [variant.source for variant in variants],
        "target": [variant.target for variant in variants],
        "feature_group": [variant.knockout.features for variant in variants],
        "layer": [variant.window.at for variant in variants],
        "window_start": [variant.window.layers[0] for variant in variants],
        "window_size": [variant.window.size for variant in variants],
    }
    repeated = {name: pd.Series(values).repeat(len(prompts)).array for name, values in columns.items()}
    return pd.DataFrame({"prompt_id": [_id(row.prompt) for row in prompts] * len(variants), **repeated})
