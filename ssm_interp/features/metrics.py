"""Numbers that a model's logits are boiled down to, one per row: what edges are worth something for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssm_interp.errors import FeatureError, InterventionError
from ssm_interp.hooks.interventions import as_indices

Metric = Callable[[Tensor], Tensor]
"""From logits to a number per row, `[b]`. The logits are those at each row's last token, `[b v]`, or `[b t v]`."""

Positions = Literal["last", "all"]


def log_probability(target: Any) -> Metric:
    """ln p of a token at each row's last position, as a metric.

    Args:
        target: its id; a sequence has one per row.

    Raises:
        FeatureError: ids that are no integers; when it is used, another number of rows, or an id outside the
            vocabulary.

    Example:
        >>> log_probability(1)(torch.zeros(1, 4)).exp()
        tensor([0.2500])
    """
    ids = token_ids(target, "target")
    return lambda logits: logits_of(logits, ids, "target") - logits.logsumexp(-1)


def logit_difference(target: Any, other: Any) -> Metric:
    """logit(target) - logit(other) at each row's last position, as a metric.

    Args:
        target: a token id; a sequence has one per row.
        other: the same, of the wrong answer.

    Raises:
        FeatureError: as `log_probability`.

    Example:
        >>> logit_difference(2, 0)(torch.tensor([[0.0, 1.0, 3.0]]))
        tensor([3.])
    """
    ids, others = token_ids(target, "target"), token_ids(other, "other")
    return lambda logits: logits_of(logits, ids, "target") - logits_of(logits, others, "other")


def measure(metric: Metric, logits: Float[Tensor, "b *t v"]) -> Float[Tensor, " b"]:
    """What a metric says of logits, checked.

    Raises:
        FeatureError: something else than one finite number per row.
    """
    rows, given = len(logits), f"{'[b v]' if logits.ndim == 2 else '[b t v]'} = {list(logits.shape)}"
    try:
        value = metric(logits)
    except IndexError as error:
        raise FeatureError(
            f"the metric cannot index the logits {given} ({error}); with positions='last' it gets those of each row's "
            "last token, [b v], with positions='all' [b t v]"
        ) from error
    expected = f"a tensor with one number for each of the {rows} rows, [{rows}]; it was given the logits {given}"
    if not isinstance(value, Tensor):
        raise FeatureError(
            f"the metric returned {value!r} of type {type(value).__name__}, but must return {expected}. Leave out "
            ".item(), float(...) and the like"
        )
    if value.shape != (rows,) and not (rows == 1 and value.ndim == 0):
        raise FeatureError(
            f"the metric returned {list(value.shape)}, but must return {expected}. Do not sum or average over the rows"
        )
    if not value.is_floating_point():
        raise FeatureError(f"the metric returned {value.dtype}, but must return {expected}, in floating point")
    if not value.isfinite().all():
        row = int((~value.reshape(rows).isfinite()).nonzero()[0, 0])
        raise FeatureError(
            f"the metric is {value.reshape(rows)[row].item()} for row {row}, not a finite number; try a wider dtype, "
            "or a metric that stays finite when edges are knocked out"
        )
    return value.reshape(rows)


def token_ids(tokens: Any, name: str) -> Int[Tensor, " r"]:
    """One token id, or one for each row.

    Raises:
        FeatureError: anything else.
    """
    try:
        ids = as_indices(tokens, name)
    except InterventionError:
        ids = None
    if not ids or min(ids) < 0:
        raise FeatureError(
            f"{name} must be a token id, or one for each row, got {tokens!r:.200}; tokenizer(text)['input_ids'] has ids"
        )
    return torch.tensor(ids)


def logits_of(logits: Tensor, ids: Int[Tensor, " r"], name: str) -> Float[Tensor, " b"]:
    """The logit of one token in each row of `[b v]`.

    Raises:
        FeatureError: logits of another rank; another number of rows; an id outside the vocabulary.
    """
    if logits.ndim != 2:
        raise FeatureError(f"this metric takes the logits at each row's last token, [b v], got {list(logits.shape)}")
    rows, vocabulary = logits.shape
    if len(ids) not in (1, rows):
        raise FeatureError(f"{name} names {len(ids)} tokens, but there are {rows} rows; give one token, or one per row")
    if (outside := ids[ids >= vocabulary]).numel():
        raise FeatureError(f"{name} names the token {int(outside[0])}, but the vocabulary has {vocabulary}")
    return logits.gather(1, ids.to(logits.device).expand(rows)[:, None])[:, 0]
