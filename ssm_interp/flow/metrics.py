"""What a knockout does to the answer: per prompt, and over prompts."""

from __future__ import annotations

import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

KEYS = ["model", "source", "target", "layer", "window_start", "window_size"]


def hits(logits: Float[Tensor, "b v"], target_ids: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
    """Whether no token is more likely than the target; `[b]`."""
    return logits.gather(1, target_ids[:, None]).squeeze(1) >= logits.amax(1)


def answer_metrics(
    logits: Float[Tensor, "b v"], base: Float[Tensor, "b v"], target_ids: Int[Tensor, " b"]
) -> dict[str, Tensor]:
    """Compare the answers of an edited run with those of the clean one.

    Args:
        logits: last-token logits of the edited run, `[b, v]`.
        base: last-token logits of the clean run, `[b, v]`.
        target_ids: first tokens of the targets, `[b]`.

    Returns:
        Columns of length b, in float64: `p_base` and `p`, probabilities of the target; `relative_change`,
        100 (p - p_base) / p_base in % (Endy et al. 2025, section 3); `logprob_difference`, ln p - ln p_base; `hit`,
        whether the target is (still) the most likely token.

    Example:
        >>> import torch
        >>> edited, clean = torch.tensor([[0.0, 0.0]]), torch.tensor([[9.0, 9.0]])
        >>> answer_metrics(edited, clean, torch.tensor([1]))["p"].item()
        0.5
    """
    index = target_ids[:, None]
    logprob = logits.double().log_softmax(1).gather(1, index).squeeze(1)
    logprob_base = base.double().log_softmax(1).gather(1, index).squeeze(1)
    difference = logprob - logprob_base
    return {
        "p_base": logprob_base.exp(),
        "p": logprob.exp(),
        "relative_change": 100 * difference.expm1(),
        "logprob_difference": difference,
        "hit": hits(logits, target_ids),
    }


def summarise(frame: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Aggregate per-prompt rows over prompts, one row per model, source, target and window.

    Prompts in which the knockout has no edges (an empty role) count as no change, as in the paper; `n_empty` says how
    many there are.

    Args:
        frame: rows as in `FlowResult.frame`.
        level: of the interval: Student's t on the mean, not defined (NaN) for a single prompt.

    Returns:
        The keys `model`, `source`, `target`, `layer`, `window_start`, `window_size`, then `n` prompts, `n_empty`,
        `mean`, `low`, `high`, `median` of the relative change in %, `logprob_difference` and its median,
        `p_base`, `p`, `accuracy` (means).
    """
    groups = frame.assign(empty=frame["n_edges"] == 0).groupby(KEYS, sort=False)
    change = groups["relative_change"]
    summary = pd.DataFrame(
        {
            "n": groups.size(),
            "n_empty": groups["empty"].sum(),
            "mean": change.mean(),
            "median": change.median(),
            "logprob_difference": groups["logprob_difference"].mean(),
            "median_logprob_difference": groups["logprob_difference"].median(),
            "p_base": groups["p_base"].mean(),
            "p": groups["p"].mean(),
            "accuracy": groups["hit"].mean(),
        }
    )
    half = stats.t.ppf((1 + level) / 2, summary["n"] - 1) * change.std(ddof=1) / summary["n"] ** 0.5
    summary.insert(3, "low", summary["mean"] - half)
    summary.insert(4, "high", summary["mean"] + half)
    return summary.reset_index()
