"""Answers under variants as a picture: every prompt a dot, and their mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ssm_interp.plots.style import INK, legend, picture, plain, short

MOST_VARIANTS = 60  # more labels than these below one another could not be read


def answers_figure(frame: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """A panel per metric: a row per variant, a dot per prompt, and the mean over prompts.

    Args:
        frame: a row per variant and prompt: `variant` and `intervention`, `row`, and a column per metric.
        metrics: the columns to draw.

    Example:
        >>> answers_figure(result.frame, result.metrics).savefig("answers.png")          # doctest: +SKIP
    """
    names = frame.drop_duplicates("variant").set_index("variant")["intervention"]
    height = 1.4 + 0.28 * min(len(names), MOST_VARIANTS)
    figure = picture(4.5 + 3.0 * len(metrics), height)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        plain(axes)
        (dots,) = axes.plot(frame[metric], frame["variant"], ".", color="#777777", alpha=0.5, markersize=4)
        means = frame.groupby("variant", sort=False)[metric].mean()
        (mean,) = axes.plot(means, means.index, "D", color=INK, markersize=5)
        axes.set_xlabel(metric, color=INK, fontsize=9)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    if len(names) <= MOST_VARIANTS:
        panels[0].set_yticks(names.index, [short(name, 90) for name in names], parse_math=False)
    else:
        panels[0].set_ylabel("Variant", color=INK, fontsize=9)
    panels[0].set_ylim(np.max(names.index) + 0.5, -0.5)
    legend(figure, [dots, mean], ["one prompt", "mean over prompts"], loc="outside lower center", ncol=2)
    return figure
