"""What a knockout does to the answer of a prompt."""

from __future__ import annotations

import numpy as np


def changes(logprob: np.ndarray, base: np.ndarray) -> dict[str, np.ndarray]:
    """Compare the answers of an edited run with those of the clean one.

    Args:
        logprob: ln p of the answer in the edited run, any shape.
        base: the same of the clean run.

    Returns:
        `p_base` and `p`, probabilities of the answer; `relative_change`, 100 (p - p_base) / p_base in %
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
