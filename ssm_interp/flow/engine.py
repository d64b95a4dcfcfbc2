"""How the answers under many knockouts are computed: as rows of one step, or by a full forward pass each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ssm_interp.flow.metrics import Outcome, outcome, outcome_of_all
from ssm_interp.flow.named_edges import edge_count
from ssm_interp.flow.windows import Window
from ssm_interp.hooks import Attachment, Knockout, obstacle, run_each
from ssm_interp.prompts import Batch
from ssm_interp.reprs import short_repr

ALL_FEATURES = "all"


@dataclass(frozen=True)
class Variant:
    """One thing to do to every prompt of a batch: remove the edges target <- source in a window of layers.

    Attributes:
        source: role, or position in the prompt, that is no longer read.
        target: role that no longer reads it.
        window: the layers; one without layers is the clean run.
        feature_group: name of the features that the knockout is restricted to.
        features: those features, per layer; None: all of them.
        through: the streams in which the edges are removed, see `Knockout`.
    """

    source: str | int
    target: str
    window: Window
    feature_group: str = ALL_FEATURES
    features: Mapping[int, Any] | None = field(default=None, compare=False)
    through: tuple[str, ...] | None = None

    __repr__ = short_repr

    def knockouts(self, batch: Batch) -> tuple[Knockout, ...]:
        """The interventions on a batch: one for the window, or one per layer where features are chosen; none where no
        prompt of the batch has such an edge."""
        if not self.window.layers or not any(edge_count(row, self.source, self.target) for row in batch.prompts):
            return ()
        edges = {
            "sources": batch.positions(self.source),
            "targets": batch.positions(self.target),
            "through": self.through,
        }
        if self.features is None:
            return (Knockout(**edges, layers=self.window.layers),)
        return tuple(Knockout(**edges, layers=layer, features=self.features[layer]) for layer in self.window.layers)


CLEAN = Variant("all", "all", Window(at=-1, layers=(), size=0))


class Answers(NamedTuple):
    """Logits at the last token of some rows of a batch under some variants."""

    variants: list[int]
    rows: list[int]
    logits: Float[Tensor, "m r v"]

    def __repr__(self) -> str:
        return short_repr(self)


Engine = Callable[[Attachment, Batch, Sequence[Variant]], Iterator[Answers]]
"""Yields the answers of every row under every variant, in any order, in pieces that fit into memory."""


class Scored(NamedTuple):
    """What some rows of a batch say about their answers under some variants."""

    variants: list[int]
    rows: list[int]
    outcome: Outcome
    dtype: torch.dtype  # of the logits

    def __repr__(self) -> str:
        return short_repr(self)


Score = Callable[[Attachment, Batch, Sequence[Variant]], Iterator[Scored]]
"""Yields what every row says about its answer under every variant, in any order."""


def of_first_token(engine: Engine) -> Score:
    """Score the first token of each answer, with an engine's logits."""

    def score(ssm: Attachment, batch: Batch, variants: Sequence[Variant]) -> Iterator[Scored]:
        for found in engine(ssm, batch, variants):
            logits = found.logits
            yield Scored(found.variants, found.rows, outcome(logits, batch.target_ids[found.rows]), logits.dtype)

    return score


def of_full_answer(ssm: Attachment, batch: Batch, variants: Sequence[Variant]) -> Iterator[Scored]:
    """Score all tokens of each answer: their joint probability, each given the right ones before it.

    Args:
        batch: of prompts with their answers behind them, see `TokenizedPrompt.continued`. Edges are those of the
            prompt: what the answer's later tokens read stays as it is.

    Cost: len(variants) forward passes of the batch.
    """
    answers = [row.answer_ids for row in batch.prompts]
    for number, logits in enumerate(_forwards(ssm, batch, variants)):
        yield Scored([number], list(range(len(answers))), outcome_of_all(logits, answers), logits.dtype)


def full_forwards(ssm: Attachment, batch: Batch, variants: Sequence[Variant]) -> Iterator[Answers]:
    """The plain engine: one forward pass of the model per variant, with the knockout in place.

    Cost: len(variants) forward passes of the batch; memory of one.
    """
    for number, logits in enumerate(_forwards(ssm, batch, variants)):
        yield Answers([number], list(range(len(batch.prompts))), logits[None, :, -1])


def _forwards(ssm: Attachment, batch: Batch, variants: Sequence[Variant]) -> Iterator[Float[Tensor, "b t v"]]:
    """The logits of the batch under each variant."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    takes = inspect.signature(ssm.model.forward).parameters
    if "position_ids" in takes and not batch.attention_mask.all():  # else padding would move learned positions
        inputs["position_ids"] = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    for variant in variants:
        with torch.no_grad(), ssm.edit(*variant.knockouts(batch)):
            output = ssm.model(**inputs, use_cache=False)
        yield output.logits


def rows_engine(max_memory: int | None = None) -> Engine:
    """The fast engine: every variant is a row of one batched step after a clean prefill, see `hooks.run_each`.

    Args:
        max_memory: bytes for the rows of a step; None: a quarter of what is free.

    Cost: one forward pass over the positions before the first target, and for each variant about one token from the
        first layer of its window on (with targets before the last token: the tokens from the first target on).
    """

    def engine(ssm: Attachment, batch: Batch, variants: Sequence[Variant]) -> Iterator[Answers]:
        knockouts = [variant.knockouts(batch) for variant in variants]
        mask = batch.attention_mask
        for found in run_each(ssm, batch.input_ids, knockouts, attention_mask=mask, max_memory=max_memory):
            yield Answers(*found)

    return engine


def choose_engine(ssm: Attachment, max_memory: int | None = None) -> tuple[Engine, str]:
    """The fast engine where it is exact, else the plain one; and a word on which and why, for the result."""
    reason = obstacle(ssm)
    return (
        (rows_engine(max_memory), "rows of one step") if reason is None else (full_forwards, f"full forwards: {reason}")
    )
