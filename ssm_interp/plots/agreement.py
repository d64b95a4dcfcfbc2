"""Attributions beside what knocking the edges out really does."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssm_interp.errors import PlotError
from ssm_interp.plots.style import group_styles, headline, picture, plain

NEEDED = ("attribution", "exact", "chosen")


def agreement_figure(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Figure:
    """A point per edge: the exact effect of knocking it out over the attribution that predicts it.

    On the dotted line both are the same. Edges of largest attribution and those drawn at random have colours of their
    own.

    Args:
        frame: `EdgeCheck.frame`: a row per edge with the columns `attribution`, `exact` and `chosen`.
        title: over the picture.
        ax: draw into these axes.

    Raises:
        PlotError: missing columns, or no rows.

    Example:
        >>> agreement_figure(check_edges(ssm, inputs, metric, edges).frame).savefig("check.png")     # doctest: +SKIP
    """
    if missing := [column for column in NEEDED if column not in frame.columns]:
        raise PlotError(f"this picture needs rows with the columns {list(NEEDED)}; these are missing: {missing}")
    if frame.empty:
        raise PlotError("this picture needs at least one edge; there are none")
    axes = picture(4.4, 4.0).subplots() if ax is None else ax
    axes.axline((0, 0), slope=1, color="0.6", linestyle=":", linewidth=1, zorder=0, label="both the same")
    for chosen, style in group_styles(frame["chosen"].unique()).items():
        rows = frame[frame["chosen"] == chosen]
        axes.scatter(rows["attribution"], rows["exact"], s=16, color=style.colour, marker=style.marker, label=chosen)
    plain(axes)
    axes.set_xlabel("Attribution (first order)", fontsize=9)
    axes.set_ylabel("Change of the metric, edge knocked out", fontsize=9)
    axes.legend(title="edges", frameon=False, fontsize=8)
    headline(axes, title)
    return axes.figure.figure
