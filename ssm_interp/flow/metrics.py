"""What a knockout does to the answer of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssm_interp.reprs import short_repr


class Outcome(NamedTuple):
    """What some rows of logits say about their targets."""

    logprob: Float[Tensor, "m r"]  # ln p of the target, float64
    hit: Bool[Tensor, "m r"]  # whether no token is more likely; of an answer of several tokens, in any of its places

    def __repr__(self) -> str:
        return short_repr(self)


def outcome(logits: Float[Tensor, "m r v"], target_ids: Int[Tensor, " r"]) -> Outcome:
    """The targets' log-probabilities (sums over the vocabulary in fp32 at least), and whether they come first.

    Args:
        logits: last-token logits, `[m, r, v]`: m variants of r prompts.
        target_ids: first tokens of the prompts' targets, `[r]`.

    Example:
        >>> import torch
        >>> outcome(torch.tensor([[[0.0, 0.0]]]), torch.tensor([1])).logprob.exp().item()
        0.5
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.take_along_dim(target_ids.to(logits.device)[None, :, None], dim=2).squeeze(2)
    logprob = torch.stack([-(row - own[:, None]).logsumexp(1) for row, own in zip(logits, chosen, strict=True)])
    return Outcome(logprob.double(), chosen >= logits.amax(2))


def outcome_of_all(logits: Float[Tensor, "r t v"], answers: Sequence[Sequence[int]]) -> Outcome:
    """The same of answers of several tokens: the log-probability of all of them, and whether each comes first.

    Args:
        logits: of texts that end with the token before the answer's last one, `[r, t, v]`: the last columns speak of
            the answer.
        answers: token ids, for each row.

    Example:
        >>> import torch
        >>> outcome_of_all(torch.zeros(1, 3, 2), [[1, 0]]).logprob.exp().item()
        0.25
    """
    found = []
    for row, answer in zip(logits, answers, strict=True):
        each = outcome(row[None, -len(answer) :], torch.tensor(answer))
        found.append((each.logprob.sum(1), each.hit.all(1)))
    logprobs, hits = zip(*found, strict=True)
    return Outcome(torch.stack(logprobs, dim=1), torch.stack(hits, dim=1))


def changes(logprob: np.ndarray, base: np.ndarray) -> dict[str, np.ndarray]:
    """Compare the answers of an edited run with those of the clean one.

    Args:
        logprob: ln p of the target in the edited run, any shape.
        base: the same of the clean run.

    Returns:
        `p_base` and `p`, probabilities of the target; `relative_change`, 100 (p - p_base) / p_base in %
        (Endy et al. 2025, section 3); `logprob_difference`, ln p - ln p_base.

    Example:
        >>> changes(np.log(np.array([0.25])), np.log(np.array([0.5])))["relative_change"].round(9)
        array([-50.])
    """
    base = np.broadcast_to(base, logprob.shape)
    difference = logprob - base
    return {
        "p_base": np.exp(base),
        "p": np.exp(logprob),
        "relative_change": 100 * np.expm1(difference),
        "logprob_difference": difference,
    }
