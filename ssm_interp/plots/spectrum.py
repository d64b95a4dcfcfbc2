"""Statistics of features as quantile bands over the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ssm_interp.errors import PlotError
from ssm_interp.plots.panels import LAYER
from ssm_interp.plots.style import FAINT, INK, Style, headline, legend, model_styles, picture, plain, printable, short

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
COLUMNS = ["model", "layer", "feature", "statistic", "value"]
LABELS: Mapping[str, str] = {
    "decay norm": "Decay norm\n(unit step)",
    "effective decay": "Effective decay\nper token",
    "half-life": "Half-life\n(tokens)",
    "mean distance": "Mean distance\n(tokens)",
    "mean dt": "Mean step dt",
    "dt variation": "Variation of dt\n(sd / mean)",
}
LOGARITHMIC = ("decay norm", "half-life", "mean dt")
BANDS = (0.16, 0.34)  # how dark the light one is, and how much the dark one adds to it
OWN_SCALE = ("decay norm",)  # a sum over state dimensions in one family, a single number in the other


def quantiles(frame: pd.DataFrame, q: Sequence[float] = QUANTILES) -> pd.DataFrame:
    """Quantiles over the features of each layer.

    Args:
        frame: rows as from `Spectrum.frame`, of any number of models.
        q: which ones, in [0, 1]. Each is the number that some feature has (the nearest rank); NaN is left out.

    Returns:
        `model`, `statistic`, `layer`, `quantile`, `value`.

    Raises:
        PlotError: missing columns, no rows; a quantile outside [0, 1], or none.

    Example:
        >>> quantiles(measured.frame, [0.5]).pivot(index="layer", columns="statistic", values="value")  # doctest: +SKIP
    """
    if missing := [column for column in COLUMNS if column not in frame.columns]:
        raise PlotError(f"quantiles need a table with the columns {COLUMNS}; these are missing: {missing}")
    if frame.empty:
        raise PlotError("quantiles need at least one row; the table is empty")
    if not len(q) or not all(0 <= share <= 1 for share in q):
        raise PlotError(f"quantiles are numbers in [0, 1], at least one, got {list(q)}")
    groups = frame.groupby(["model", "statistic", "layer"], sort=False)["value"]
    values: pd.Series = groups.quantile(list(q), interpolation="nearest")
    return values.rename_axis(index={None: "quantile"}).reset_index()


def spectrum_figure(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """The features of every layer: the median as a line, half of them in the dark band, nine in ten in the light one.

    A row of panels per statistic, on one scale (but for the decay norm), a column per model. Decay norms, half-lives
    and steps are drawn on a logarithmic scale; what is infinite, or no number, is left out.

    Args:
        frame: rows as from `Spectrum.frame`, of any number of models.
        title: over the picture; a reader wants to know on which texts it was measured.

    Raises:
        PlotError: missing columns, no rows; more models than can be told apart.

    Example:
        >>> spectrum_figure(pd.concat([measured.frame, other.frame])).savefig("spectrum.png")      # doctest: +SKIP
    """
    rows = quantiles(frame)
    styles = model_styles(rows["model"].unique())
    statistics = list(rows["statistic"].unique())
    figure = picture(1.4 + 3.4 * len(styles), 1.0 + 1.65 * len(statistics))
    grid = figure.subplots(len(statistics), len(styles), sharex="col", squeeze=False)
    for line, statistic in zip(grid, statistics, strict=True):
        for axes in line[1:] if statistic not in OWN_SCALE else ():
            axes.sharey(line[0])
            axes.tick_params(labelleft=False)
        for axes, (model, style) in zip(line, styles.items(), strict=True):
            part = rows[(rows["model"] == model) & (rows["statistic"] == statistic)]
            _bands(axes, part, style, logarithmic=statistic in LOGARITHMIC)
        own = "\n(each its own scale)" if statistic in OWN_SCALE and len(styles) > 1 else ""
        label = f"{LABELS.get(statistic, printable(statistic))}{own}"
        line[0].set_ylabel(label, fontsize=9, color=INK, parse_math=False)
    for axes, model in zip(grid[0], styles, strict=True):
        features = frame[frame["model"] == model].groupby("layer")["feature"].nunique()
        count = " to ".join(dict.fromkeys((str(features.min()), str(features.max()))))
        headline(axes, f"{short(str(model))}   ({count} features a layer)")
    for axes in grid[-1]:
        axes.set_xlabel(LAYER, fontsize=9, color=INK)
    headline(figure, title)
    _legend(figure, list(styles.values()))
    return figure


def _bands(axes: Axes, rows: pd.DataFrame, style: Style, *, logarithmic: bool) -> None:
    table = rows.pivot(index="layer", columns="quantile", values="value").sort_index()
    lowest, low, middle, high, highest = table.where(np.isfinite(table)).to_numpy(float).T
    layers = table.index.to_numpy()
    axes.fill_between(layers, lowest, highest, color=style.colour, alpha=BANDS[0], linewidth=0)
    axes.fill_between(layers, low, high, color=style.colour, alpha=BANDS[1], linewidth=0)
    axes.plot(
        layers, middle, color=style.colour, linewidth=1.6, marker=style.marker, markersize=4, markeredgecolor="white",
        markeredgewidth=0.5, markevery=-(-len(layers) // 16),
    )  # fmt: skip
    if logarithmic and np.nanmax(table.where(np.isfinite(table)).to_numpy(float), initial=0) > 0:
        axes.set_yscale("log")
        decades = _decades(table)
        powers = LogLocator(subs=(1, 3) if decades < 2 else (1,), numticks=6)
        axes.yaxis.set_major_locator(powers if decades > 1 else MaxNLocator(nbins=4))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter("{:g}".format))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.margins(x=0.03)
    plain(axes)


def _decades(table: pd.DataFrame) -> float:
    values = table.to_numpy(float)
    drawn = values[np.isfinite(values) & (values > 0)]
    return float(np.log10(drawn.max() / drawn.min()))


def _legend(figure: Figure, styles: Sequence[Style]) -> None:
    """What a line and its bands are, in the colours of all models."""
    light, dark = BANDS[0], 1 - (1 - BANDS[0]) * (1 - BANDS[1])  # as they look, one over the other
    handles = [
        tuple(Line2D([], [], color=style.colour, linewidth=1.6, marker=style.marker, markersize=4) for style in styles),
        tuple(Patch(color=style.colour, alpha=dark, linewidth=0) for style in styles),
        tuple(Patch(color=style.colour, alpha=light, linewidth=0) for style in styles),
    ]
    names = ["median of the features", "25 to 75 %", "5 to 95 %"]
    options = {"handler_map": {tuple: HandlerTuple(ndivide=None)}, "handlelength": 2 * len(styles), "ncols": 3}
    legend(figure, handles, names, loc="outside lower center", **options)
