"""Numbers that a model's logits are boiled down to, one per row: by name, or a function of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssm_interp.arguments import as_indices
from ssm_interp.errors import InterventionError, MetricError
from ssm_interp.reprs import describe

Metric: TypeAlias = Callable[[Tensor], Tensor]
"""From logits to a number per row, `[b]`. The logits are those at each row's last token, `[b v]`, or `[b t v]`."""

Positions = Literal["last", "all"]

NAMES: dict[str, str] = {
    "log_probability": "ln p of the answer (nats)",
    "probability": "p of the answer",
    "logit_difference": "logit of the answer - logit of the other token that the clean run finds most likely",
    "rank": "how many tokens are more likely than the answer",
    "accuracy": "share of prompts whose answer is the most likely token",
    "kl": "KL divergence of the next token from the clean run's (nats)",
}
"""Metrics by name, and what they say."""

OF_FULL_ANSWERS = ("log_probability", "probability", "accuracy")


def log_probability(answer: Any) -> Metric:
    """ln p of a token at each row's last position, as a metric.

    Args:
        answer: its id; a sequence has one per row.

    Raises:
        MetricError: ids that are no integers; when it is used, another number of rows, or an id outside the
            vocabulary.

    Example:
        >>> log_probability(1)(torch.zeros(1, 4)).exp()
        tensor([0.2500])
    """
    ids = token_ids(answer, "answer")
    return lambda logits: -(logits - logits_of(logits, ids, "answer")[:, None]).logsumexp(-1)


def logit_difference(answer: Any, other: Any) -> Metric:
    """logit(answer) - logit(other) at each row's last position, as a metric.

    Args:
        answer: a token id; a sequence has one per row.
        other: the same, of the wrong answer.

    Raises:
        MetricError: as `log_probability`.

    Example:
        >>> logit_difference(2, 0)(torch.tensor([[0.0, 1.0, 3.0]]))
        tensor([3.])
    """
    ids, others = token_ids(answer, "answer"), token_ids(other, "other")
    return lambda logits: logits_of(logits, ids, "answer") - logits_of(logits, others, "other")


def kl_divergence(clean: Float[Tensor, "b v"]) -> Metric:
    """KL(clean || edited) of the next token at each row's last position, in nats, as a metric.

    Args:
        clean: the logits of the clean run.

    Example:
        >>> kl_divergence(torch.zeros(1, 4))(torch.zeros(1, 4))
        tensor([0.])
    """
    expected = clean.log_softmax(-1)

    def measured(logits: Tensor) -> Tensor:
        if logits.shape != clean.shape:
            raise MetricError(f"the clean logits are {list(clean.shape)}, but these are {list(logits.shape)}")
        return (expected.exp() * (expected.to(logits) - logits.log_softmax(-1))).sum(-1)

    return measured


def rank(answer: Any) -> Metric:
    """How many tokens are more likely than the answer at each row's last position, as a metric: 0 where none is.

    Args:
        answer: its id; a sequence has one per row.

    Example:
        >>> rank(1)(torch.tensor([[3.0, 2.0, 1.0]]))
        tensor([1.])
    """
    ids = token_ids(answer, "answer")
    return lambda logits: (logits > logits_of(logits, ids, "answer")[:, None]).sum(-1).to(logits.dtype)


def accuracy(answer: Any) -> Metric:
    """1 where no token is more likely than the answer at a row's last position, else 0, as a metric.

    Args:
        answer: its id; a sequence has one per row.
    """
    ids = token_ids(answer, "answer")
    return lambda logits: (logits_of(logits, ids, "answer") >= logits.amax(-1)).to(logits.dtype)


def names_of(metrics: Sequence[str | Metric]) -> tuple[str, ...]:
    """What metrics are called, each differently: by their name, or that of the function."""
    names: list[str] = []
    for metric in metrics:
        name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
        name = "metric" if name == "<lambda>" else name
        same = sum(known.split(" ")[0] == name for known in names)
        names.append(f"{name} {same + 1}" if same else name)
    return tuple(names)


@dataclass(frozen=True)
class Measured:
    """A metric that is ready for the prompts of one batch.

    Attributes:
        name: of a named one; "metric" of a function.
        metric: of the logits of all of them.
        positions: "last" or "all", the logits that it gets.
        of_rows: gives the metric of some of the prompts; None: a function knows them all together alone.
    """

    name: str
    metric: Metric
    positions: Positions = "last"
    of_rows: Callable[[Sequence[int]], Metric] | None = None

    @staticmethod
    def named(name: str, of_rows: Callable[[Sequence[int]], Metric], rows: int) -> Measured:
        """One whose value for a prompt depends on that prompt alone."""

        def checked(some: Sequence[int]) -> Metric:
            metric = of_rows(some)
            return lambda logits: measure(metric, logits)

        return Measured(name, of_rows(range(rows)), "last", checked)

    def of(self, logits: Float[Tensor, "b *t v"]) -> Float[Tensor, " b"]:
        """What it says of logits, checked; raises as `measure`."""
        return measure(self.metric, logits)


def as_measured(
    metric: str | Metric,
    *,
    answer_ids: Int[Tensor, " b"] | None,
    clean: Callable[[], Float[Tensor, "b v"]],
    positions: Positions = "last",
) -> Measured:
    """A metric for a batch, from its name or a function.

    Args:
        metric: one of `NAMES`, or a function from logits to a number per row.
        answer_ids: the first token of each answer; None: the prompts have none.
        clean: gives the clean logits at the last tokens, where a metric needs them.
        positions: the logits that a function gets.

    Raises:
        MetricError: neither; a name that needs answers, without any.
    """
    if not isinstance(metric, str):
        if not callable(metric):
            raise MetricError(
                f"the metric must be a name ({', '.join(NAMES)}) or a function of logits, such as "
                f"logit_difference(answer, other), got {describe(metric)}"
            )
        return Measured("metric", metric, positions)
    check_name(metric)
    if metric == "kl":
        logits = clean()
        return Measured.named(metric, lambda rows: kl_divergence(logits[list(rows)]), len(logits))
    if answer_ids is None:
        raise MetricError(
            f"the metric {metric!r} needs the prompts' answers, which a Batch of prompts has; for plain input_ids "
            "give a function from logits at the last token [b v] to a number per row [b]"
        )
    ids: list[int] = answer_ids.tolist()
    of_answer = {"log_probability": log_probability, "probability": _probability, "rank": rank, "accuracy": accuracy}
    if metric == "logit_difference":
        rivals = _rivals(clean(), ids)
        return Measured.named(
            metric, lambda rows: logit_difference([ids[row] for row in rows], [rivals[row] for row in rows]), len(ids)
        )
    return Measured.named(metric, lambda rows: of_answer[metric]([ids[row] for row in rows]), len(ids))


def _probability(answer: Any) -> Metric:
    logprob = log_probability(answer)
    return lambda logits: logprob(logits).exp()


def check_name(metric: str) -> None:
    """Raise MetricError if there is no metric of a name."""
    if metric not in NAMES:
        near = get_close_matches(metric, NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise MetricError(f"there is no metric {metric!r}: {hint}there are {', '.join(NAMES)}, or give a function")


def _rivals(clean: Float[Tensor, "b v"], ids: Sequence[int]) -> list[int]:
    """The most likely tokens of a clean run that are not the answers."""
    others = clean.clone()
    others[range(len(ids)), ids] = -torch.inf
    rivals: list[int] = others.argmax(-1).tolist()
    return rivals


def check_full_answer(name: str) -> None:
    """Raise MetricError if there is no metric of a name that is about all tokens of an answer."""
    check_name(name)
    if name not in OF_FULL_ANSWERS:
        raise MetricError(
            f"of full answers there are the metrics {', '.join(OF_FULL_ANSWERS)}; {name!r} is about one token"
        )


def of_full_answer(name: str, logits: Float[Tensor, "b t v"], answers: Sequence[Sequence[int]]) -> Float[Tensor, " b"]:
    """A named metric of answers of several tokens, each given the right ones before it.

    Args:
        logits: of texts that end with the token before the answer's last one: the last columns speak of the answer.
        answers: token ids, for each row.

    Raises:
        MetricError: a metric of one token.

    Example:
        >>> of_full_answer("probability", torch.zeros(1, 3, 2), [[1, 0]])
        tensor([0.2500], dtype=torch.float64)
    """
    check_full_answer(name)
    measured = []
    for row, answer in zip(logits, answers, strict=True):
        each, ids = row[-len(answer) :], list(answer)
        if name == "accuracy":
            measured.append(accuracy(ids)(each).amin())
        else:
            measured.append(log_probability(ids)(precise(each)).double().sum())
    values = torch.stack([value.double() for value in measured])
    return values.exp() if name == "probability" else values


def precise(logits: Tensor) -> Tensor:
    """Logits in fp32 at least, for sums over the vocabulary."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def measure(metric: Metric, logits: Float[Tensor, "b *t v"]) -> Float[Tensor, " b"]:
    """What a metric says of logits, checked.

    Raises:
        MetricError: something else than one finite number per row.
    """
    rows, given = len(logits), f"{'[b v]' if logits.ndim == 2 else '[b t v]'} = {list(logits.shape)}"
    try:
        value = metric(logits)
    except IndexError as error:
        raise MetricError(
            f"the metric cannot index the logits {given} ({error}); with positions='last' it gets those of each row's "
            "last token, [b v], with positions='all' [b t v]"
        ) from error
    expected = f"a tensor with one number for each of the {rows} rows, [{rows}]; it was given the logits {given}"
    if not isinstance(value, Tensor):
        raise MetricError(
            f"the metric returned {value!r} of type {type(value).__name__}, but must return {expected}. Leave out "
            ".item(), float(...) and the like"
        )
    if value.shape != (rows,) and not (rows == 1 and value.ndim == 0):
        raise MetricError(
            f"the metric returned {list(value.shape)}, but must return {expected}. Do not sum or average over the rows"
        )
    if not value.is_floating_point():
        raise MetricError(f"the metric returned {value.dtype}, but must return {expected}, in floating point")
    if not value.isfinite().all():
        row = int((~value.reshape(rows).isfinite()).nonzero()[0, 0])
        raise MetricError(
            f"the metric is {value.reshape(rows)[row].item()} for row {row}, not a finite number; try a wider dtype, "
            "or a metric that stays finite when edges are knocked out"
        )
    return value.reshape(rows)


def token_ids(tokens: Any, name: str) -> Int[Tensor, " r"]:
    """One token id, or one for each row.

    Raises:
        MetricError: anything else.
    """
    try:
        ids = as_indices(tokens, name)
    except InterventionError:
        ids = None
    if not ids or min(ids) < 0:
        raise MetricError(
            f"{name} must be a token id, or one for each row, got {tokens!r:.200}; tokenizer(text)['input_ids'] has ids"
        )
    return torch.tensor(ids)


def logits_of(logits: Tensor, ids: Int[Tensor, " r"], name: str) -> Float[Tensor, " b"]:
    """The logit of one token in each row of `[b v]`.

    Raises:
        MetricError: logits of another rank; another number of rows; an id outside the vocabulary.
    """
    if logits.ndim != 2:
        raise MetricError(f"this metric takes the logits at each row's last token, [b v], got {list(logits.shape)}")
    rows, vocabulary = logits.shape
    if len(ids) not in (1, rows):
        raise MetricError(f"{name} names {len(ids)} tokens, but there are {rows} rows; give one token, or one per row")
    if (outside := ids[ids >= vocabulary]).numel():
        raise MetricError(f"{name} names the token {int(outside[0])}, but the vocabulary has {vocabulary}")
    return logits.gather(1, ids.to(logits.device).expand(rows)[:, None])[:, 0]
