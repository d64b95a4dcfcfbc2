"""What a knockout does to the answer of a prompt."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Outcome(NamedTuple):
    """What some rows of logits say about their targets."""

    logprob: Float[Tensor, "m r"]  # ln p of the target, float64
    hit: Bool[Tensor, "m r"]  # whether no token is more likely


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
