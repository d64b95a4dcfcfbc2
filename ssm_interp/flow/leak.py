"""What a knockout of the SSM's edges leaves: the convolution before the SSM hands a target the last few tokens too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from ssm_interp import plots
from ssm_interp.flow.result import FlowResult
from ssm_interp.flow.summary import KEYS, mean_interval, summarise
from ssm_interp.flow.sweep import sweep
from ssm_interp.hooks import Attachment
from ssm_interp.prompts import Prompt
from ssm_interp.results import Result

THROUGH: Mapping[str, tuple[str, ...]] = {"ssm": ("ssm",), "conv": ("conv",), "ssm + conv": ("ssm", "conv")}


@dataclass(frozen=True, eq=False, repr=False)
class LeakReport(Result):
    """The same knockouts through the SSM alone, the convolution alone, and both.

    Attributes:
        frame: the rows of the three sweeps (see `FlowResult.frame`) with a column `through`: "ssm", "conv" or
            "ssm + conv".

    Example:
        >>> report.summary()[["source", "layer", "ssm", "ssm + conv", "leak", "low", "high"]]        # doctest: +SKIP
        >>> report.plot().savefig("leak.png", dpi=200)                                                # doctest: +SKIP
    """

    frame: pd.DataFrame

    def by_prompt(self) -> pd.DataFrame:
        """One row per prompt and knockout.

        Returns:
            `prompt_id`, the keys of a summary, `p_base`; `ssm`, `conv` and `ssm + conv`: the answer's probability under
            each; `leak`: 100 (p through ssm - p through both) / p_base in %: the share of the answer that survives the
            SSM's knockout because the convolution carries it. Where a metric was asked for, `value_leak`: what it says
            under the knockout through the SSM less that through both.
        """
        keys = ["prompt_id", *KEYS]  # p_base differs in its last digits from sweep to sweep
        wide = self.frame.pivot(index=keys, columns="through", values="p")[list(THROUGH)]
        clean = self.frame[self.frame["through"] == "ssm"].set_index(keys)["p_base"]
        wide = wide.join(clean).assign(leak=lambda rows: 100 * (rows["ssm"] - rows["ssm + conv"]) / rows["p_base"])
        if "value" in self.frame:
            value = self.frame.pivot(index=keys, columns="through", values="value")
            wide = wide.assign(value_leak=value["ssm"] - value["ssm + conv"])
        return wide.reset_index().rename_axis(columns=None)

    def summary(self, *, level: float = 0.95) -> pd.DataFrame:
        """Means over prompts, one row per model, source, target, feature group and window.

        Returns:
            The keys; `ssm`, `conv`, `ssm + conv`: mean relative change of the answer's probability in %; `leak` with
            its interval `low` to `high` (bootstrap): the mean of `by_prompt`'s; `n` prompts; where a metric was asked
            for, the mean `value_leak`.
        """
        changes = self.frame.groupby([*KEYS, "through"], sort=False)["relative_change"].mean().unstack("through")
        groups = self.by_prompt().groupby(KEYS, sort=False)
        leak = mean_interval(groups["leak"], level).rename(columns={"mean": "leak"})
        if "value" in self.frame:
            leak = leak.join(groups["value_leak"].mean())
        return changes[list(THROUGH)].join(leak).reset_index().rename_axis(columns=None)

    def plot(self) -> Figure:
        """A panel per source (and model and target): mean relative change over the windows, a line per stream."""
        parts = [summarise(rows).assign(through=through) for through, rows in self.frame.groupby("through", sort=False)]
        return plots.stream_figure(pd.concat(parts, ignore_index=True))


def leak(
    ssm: Attachment,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    sources: Sequence[str | int] = ("subject", "relation", "last"),
    **options: Any,
) -> LeakReport:
    """How much of the recall flows past a knockout, through the convolution (four taps, usually) before the SSM.

    Args:
        ssm: an attached model with SSM layers, in eval mode.
        tokenizer: the model's own; a fast one.
        prompts: with distinct ids (or texts).
        sources: roles, or positions, no longer read.
        options: as of `sweep`: targets, windows, align, answered_only, full_answer, batch_size, max_memory, metric, by,
            name, revision; but features (the convolution feeds all of them together) and through.

    Raises:
        TypeError: `features` or `through` among the options.
        As `sweep`.

    Cost: three sweeps.

    Example:
        >>> model, tokenizer = si.load("tiny-mamba2")                            # doctest: +SKIP
        >>> with si.attach(model) as ssm:                                        # doctest: +SKIP
        ...     report = leak(ssm, tokenizer, load_prompts()[:100], windows=3)
    """
    if wrong := {"features", "through"} & options.keys():
        raise TypeError(
            f"leak takes no {' and no '.join(sorted(wrong))}: it compares knockouts of all features through the SSM, "
            "the convolution, and both"
        )
    results: dict[str, FlowResult] = {
        name: sweep(ssm, tokenizer, prompts, sources=sources, through=streams, **options)
        for name, streams in THROUGH.items()
    }
    return LeakReport(
        pd.concat([result.frame.assign(through=name) for name, result in results.items()], ignore_index=True)
    )
