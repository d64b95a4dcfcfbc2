"""Metrics of logits under variants, as these come in: by rows of one step, or by full forwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ssm_interp.errors import MetricError
from ssm_interp.hooks.edits.masks import last_columns
from ssm_interp.hooks.intervention import Intervention
from ssm_interp.hooks.rows.asked import Asked
from ssm_interp.hooks.rows.engine import run_each
from ssm_interp.hooks.rows.forwards import FullForwards
from ssm_interp.hooks.rows.metrics import (
    Measured,
    Metric,
    Positions,
    as_measured,
    check_full_answer,
    of_full_answer,
    precise,
)

Interventions = Sequence[Intervention]
"""What one variant does."""


class Scores:
    """What some metrics say of a batch under variants.

    Attributes:
        asked: the batch.
        positions: "last" or "all", the logits that the metrics need.
    """

    def __init__(self, asked: Asked, metrics: Sequence[str | Metric], positions: Positions, batch_size: int) -> None:
        self.asked, self.batch_size = asked, batch_size
        self._everyone = list(range(len(asked.mask)))
        self.positions: Positions = "all"
        if asked.full_answers is None:
            ids = asked.answer_ids
            self._measured = [
                as_measured(metric, answer_ids=ids, clean=lambda: precise(asked.clean), positions=positions)
                for metric in metrics
            ]
            if all(measured.positions == "last" for measured in self._measured):
                self.positions = "last"
        else:
            self._named = [_of_full_answers(metric) for metric in metrics]

    @property
    def needs_forwards(self) -> str | None:
        """Why the logits at the last tokens will not do; None: they will."""
        if self.asked.full_answers is not None:
            return "every token of the answer is scored"
        return "the metric takes all positions" if self.positions == "all" else None

    def by_rows(
        self, variants: Sequence[Interventions], labels: Sequence[str], max_memory: int | None
    ) -> Iterator[tuple[list[int], list[int], Float[Tensor, "metric m r"]]]:
        """Variants, prompts, and what the metrics say of them, as rows of one step."""
        ids = self.asked.inputs["input_ids"]
        mask = self.asked.mask.to(ids.device)
        for part in run_each(self.asked.ssm, ids, variants, attention_mask=mask, max_memory=max_memory, refuse=False):
            of_rows = self._ready(part.rows)
            scored = [
                self._of(labels[number], logits, of_rows)
                for number, logits in zip(part.variants, part.logits, strict=True)
            ]
            yield part.variants, part.rows, torch.stack(scored, dim=1)

    def by_forwards(
        self, variants: Sequence[Interventions], labels: Sequence[str]
    ) -> Iterator[tuple[list[int], list[int], Float[Tensor, "metric m r"]]]:
        """The same by full forwards."""
        asked = self.asked
        keep = max(map(len, asked.full_answers)) if asked.full_answers is not None else 0
        alone = asked.obstacle is not None
        forwards = FullForwards(asked.ssm, asked.inputs, asked.mask, self.batch_size, alone, self.positions, keep)
        of_rows = self._ready(self._everyone)
        for number, logits in forwards.logits(variants):
            yield [number], self._everyone, self._of(labels[number], logits, of_rows)[:, None]

    def _of(self, label: str, logits: Float[Tensor, "r *t v"], of_rows: Sequence[Metric]) -> Float[Tensor, "metric r"]:
        """What the metrics say of the logits of some prompts under a variant, which errors name."""
        try:
            return torch.stack([metric(logits) for metric in of_rows])
        except MetricError as error:
            raise MetricError(f"{label}: {error}") from error

    def _ready(self, rows: list[int]) -> list[Metric]:
        """The metrics, for logits of these prompts."""
        full = self.asked.full_answers
        if full is not None:
            return [partial(of_full_answer, name, answers=full) for name in self._named]
        return [self._of_rows(measured, rows) for measured in self._measured]

    def _of_rows(self, measured: Measured, rows: list[int]) -> Metric:
        if measured.of_rows is not None:
            metric = measured.of_rows(rows)
            return lambda logits: metric(precise(self._needed(measured, logits))).double()
        if rows == self._everyone:
            return lambda logits: measured.of(self._needed(measured, logits).double()).double()
        clean = self.asked.clean.double()

        def among_the_others(logits: Tensor) -> Tensor:
            whole = clean.clone()  # the other prompts stand there with their clean logits
            whole[rows] = logits.double()
            return measured.of(whole)[rows].double()

        return among_the_others

    def _needed(self, measured: Measured, logits: Float[Tensor, "r *t v"]) -> Float[Tensor, "r *t v"]:
        """Of the logits those that a metric takes."""
        if measured.positions == self.positions:
            return logits
        return logits[torch.arange(len(logits)), last_columns(self.asked.mask)]


def in_words(variant: Intervention | Interventions) -> str:
    """What a variant does."""
    interventions = variant if isinstance(variant, list | tuple) else [variant]
    return ", ".join(map(repr, interventions)) or "the clean run"


def _of_full_answers(metric: str | Metric) -> str:
    if not isinstance(metric, str):
        raise MetricError("of full answers there are metrics by name alone, such as 'log_probability'")
    check_full_answer(metric)
    return metric
