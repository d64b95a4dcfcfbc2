"""Information flow as lines over the layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ssm_interp.errors import PlotError
from ssm_interp.plots.panels import (
    Layout,
    Panel,
    Statistic,
    StatisticName,
    arrange,
    covered,
    drawable,
    header,
    layer_label,
    legend_title,
    value_range,
)
from ssm_interp.plots.style import (
    FAINT,
    INK,
    Style,
    group_styles,
    headline,
    legend,
    model_styles,
    picture,
    plain,
    readable,
    short,
    signed,
    source_styles,
)

FLOW_KEYS = ("model", "feature_group", "window", "target")
DEPTH = "Layer depth in %\n(0: the model's first window, 100: its last)"
LINE, COVER = 1.6, 1.7  # points: a line, and what a hidden line stands out on both sides together
HIDDEN = "_hidden"
LANE = 36  # characters that fit beside a panel


def flow_figure(
    summary: pd.DataFrame,
    *,
    x_labels: Mapping[str, str] | None = None,
    statistic: StatisticName = "mean",
    ax: Axes | None = None,
) -> Figure:
    """Information flow: what knocking a source out does to the answer, over the layer windows.

    In each panel a line per source role, its interval as a band. Whatever else varies gets panels of its own: of
    model, feature group, window size and target the first that varies goes across, the others go down.

    Args:
        summary: rows as from `FlowResult.summary`.
        x_labels: what the layer axis says, per model; by default which layer of its window a point is drawn at.
        statistic: what is drawn over prompts: the `"mean"` or `"median"` of the relative change of the answer's
            probability, the mean `"logprob_difference"`, or the `"accuracy"` that is left.
        ax: draw into these axes; only where one panel is enough.

    Raises:
        PlotError: no rows, missing columns, an unknown statistic; several panels for one `ax`.

    Example:
        >>> flow_figure(result.summary(), statistic="median").savefig("flow.svg")      # doctest: +SKIP
    """
    rows, chosen = drawable(summary, statistic)
    layout = arrange(rows, FLOW_KEYS)
    styles = source_styles(rows["source"].unique())
    if ax is not None:
        _one_panel(layout, ax, chosen, styles, x_labels or {})
        return ax.figure.figure
    figure = _drawn(rows, layout, chosen, "source", styles, x_labels or {})
    _legend(figure, list(map(readable, styles)), styles.values(), legend_title("Source knocked out", chosen, rows))
    return figure


def features_figure(
    summary: pd.DataFrame, *, x_labels: Mapping[str, str] | None = None, statistic: StatisticName = "mean"
) -> Figure:
    """Feature groups in the same axes: what knocking each of them out does to the answer, over the layer windows.

    A panel per model; whatever else varies, source, window size and target, goes down.

    Args:
        summary, x_labels, statistic: as in `flow_figure`.

    Raises:
        PlotError: no rows, missing columns, an unknown statistic; more groups than can be told apart (9).

    Example:
        >>> features_figure(result.summary()).savefig("features.png", dpi=200)             # doctest: +SKIP
    """
    rows, chosen = drawable(summary, statistic)
    styles = group_styles(rows["feature_group"].unique())
    layout = arrange(rows, ("model", "source", "window", "target"))
    figure = _drawn(rows, layout, chosen, "feature_group", styles, x_labels or {})
    _legend(figure, list(styles), styles.values(), legend_title("Features knocked out", chosen, rows))
    return figure


def _drawn(
    rows: pd.DataFrame,
    layout: Layout,
    chosen: Statistic,
    key: str,
    styles: Mapping[str, Style],
    x_labels: Mapping[str, str],
) -> Figure:
    """Panels over the layers, a line per value of `key` in each."""
    height, width = layout.shape
    figure = picture(1.1 + 3.9 * width, 1.1 + 2.8 * height)
    layers: Literal["all", "none", "col"] = "all" if layout.across != "model" else "none" if layout.wrapped else "col"
    grid = figure.subplots(height, width, sharex=layers, sharey="all", squeeze=False)
    _fill(grid, layout, chosen, key, styles, x_labels)
    figure.supylabel(chosen.label, fontsize=9, color=INK)
    if layout.across != "model":
        name = short(str(rows["model"].iloc[0]), 60)
        headline(figure, f"{name}   ({header(rows)})")
    return figure


def _one_panel(
    layout: Layout, axes: Axes, chosen: Statistic, styles: Mapping[str, Style], x_labels: Mapping[str, str]
) -> None:
    if len(layout.panels) > 1:
        raise PlotError(
            f"one axes holds one panel, but this summary fills {len(layout.panels)}: it differs in {layout.across}"
            f"{' and more' if layout.panels[0].down else ''}; choose its rows first, or leave `ax` out"
        )
    panel = layout.panels[0]
    _lines(axes, panel.rows, "source", "layer", styles, chosen, value_range(panel.rows, chosen))
    _layer_axis(axes)
    headline(axes, f"{panel.across}   ({header(panel.rows)})")
    axes.set_xlabel(_layer_label(panel, x_labels), fontsize=9, parse_math=False)
    axes.set_ylabel("\n".join((chosen.label, *panel.lane)), fontsize=9, color=INK)
    legend(axes, _handles(styles.values()), list(map(readable, styles)), title="Source knocked out", **_LEGEND)


def _fill(
    grid: Any, layout: Layout, chosen: Statistic, key: str, styles: Mapping[str, Style], x_labels: Mapping[str, str]
) -> None:
    for axes in grid.flat:
        axes.set_visible(False)
    bounds = value_range(pd.concat([panel.rows for panel in layout.panels]), chosen)
    for panel in layout.panels:
        axes = grid[panel.row, panel.column]
        axes.set_visible(True)
        _lines(axes, panel.rows, key, "layer", styles, chosen, bounds)
        _layer_axis(axes)
        _titles(axes, panel, layout)
        if layout.lowest(panel):
            axes.set_xlabel(_layer_label(panel, x_labels), fontsize=9, parse_math=False)
            axes.tick_params(labelbottom=True)


def _layer_label(panel: Panel, x_labels: Mapping[str, str]) -> str:
    return x_labels.get(panel.rows["model"].iloc[0]) or layer_label(panel.rows)


def _titles(axes: Axes, panel: Panel, layout: Layout) -> None:
    if panel.row == 0 or layout.wrapped:
        count = f"   ({header(panel.rows)})" if layout.across == "model" else ""
        headline(axes, f"{panel.across}{count}", size=9.5)
    if panel.column == 0:
        words = "\n".join(fill(line, LANE) for line in panel.lane)
        axes.set_ylabel(words, fontsize=9, color=INK, parse_math=False)


def depth_figure(summary: pd.DataFrame, *, statistic: StatisticName = "mean") -> Figure:
    """Several models in the same axes, over layer depth in %: 0 is a model's first window, 100 its last one.

    A panel per source, and a row for each target, feature group and window size; in each a line per model with its
    interval as a band. Depth runs over the model's layer numbers from its first window in the summary to its last.

    Args:
        summary: rows as from `FlowResult.summary`, with every window of each model.
        statistic: as in `flow_figure`.

    Raises:
        PlotError: no rows, missing columns, an unknown statistic; more models than can be told apart (9).

    Example:
        >>> depth_figure(FlowResult.join(results).summary()).savefig("depth.png", dpi=200)      # doctest: +SKIP
    """
    rows, chosen = drawable(summary, statistic)
    ends = rows.groupby(["model", "window"])["layer"]
    first, last = ends.transform("min"), ends.transform("max")
    rows["depth"] = 100 * (rows["layer"] - first) / (last - first).clip(lower=1)
    styles = model_styles(rows["model"].unique())
    layout = arrange(rows, ("target", "feature_group", "window"), across="source")
    figure = _by_source(layout, "model", "depth", styles, chosen, DEPTH)
    for axes in figure.axes:
        axes.set_xticks([0, 25, 50, 75, 100])
    counts = {model: header(part) for model, part in rows.groupby("model", sort=False)}
    names = [f"{short(str(model))}  ({counts[model]})" for model in styles]
    _legend(figure, names, styles.values(), legend_title("Model", chosen, rows))
    return figure


def stream_figure(summary: pd.DataFrame, *, statistic: StatisticName = "mean") -> Figure:
    """The same knockouts through different streams in the same axes, over the layer windows.

    A panel per source, and a row for each model, target, feature group and window size; in each a line per stream.

    Args:
        summary: rows as from `FlowResult.summary`, with a column `through`.
        statistic: as in `flow_figure`.

    Raises:
        PlotError: no rows, missing columns, an unknown statistic.

    Example:
        >>> stream_figure(pd.concat([result.summary().assign(through="ssm"), ...]))      # doctest: +SKIP
    """
    if "through" not in summary.columns:
        raise PlotError("a picture of streams needs a column `through`, which names the streams of each row")
    by_stream = {name: drawable(rows, statistic) for name, rows in summary.groupby("through", sort=False)}
    rows = pd.concat([part.assign(through=name) for name, (part, _) in by_stream.items()])
    chosen = next(iter(by_stream.values()))[1]
    styles = model_styles(rows["through"].unique())
    layout = arrange(rows, ("model", "target", "feature_group", "window"), across="source")
    figure = _by_source(layout, "through", "layer", styles, chosen, layer_label(rows))
    for axes in figure.axes:
        _layer_axis(axes)
    models = list(map(str, rows["model"].unique()))
    headline(figure, f"{short(models[0], 60) if len(models) == 1 else f'{len(models)} models'}   ({header(rows)})")
    _legend(figure, list(map(str, styles)), styles.values(), legend_title("Knocked out through", chosen, rows))
    return figure


def _by_source(
    layout: Layout, key: str, x: str, styles: Mapping[str, Style], chosen: Statistic, x_label: str
) -> Figure:
    """A panel per source, in each a line per value of `key`."""
    height, width = layout.shape
    figure = picture(1.1 + 3.3 * width, 1.4 + 2.8 * height)
    grid = figure.subplots(height, width, sharex="row", sharey="all", squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    bounds = value_range(pd.concat([panel.rows for panel in layout.panels]), chosen)
    for panel in layout.panels:
        axes = grid[panel.row, panel.column]
        axes.set_visible(True)
        _lines(axes, panel.rows, key, x, styles, chosen, bounds)
        _titles(axes, panel, layout)
        if layout.lowest(panel):
            axes.set_xlabel(x_label, fontsize=9)
            axes.tick_params(labelbottom=True)
    figure.supylabel(chosen.label, fontsize=9, color=INK)
    return figure


def _lines(
    axes: Axes,
    rows: pd.DataFrame,
    key: str,
    x: str,
    styles: Mapping[str, Style],
    statistic: Statistic,
    bounds: tuple[float, float],
) -> None:
    """A line per value of `key`, its interval as a band; where lines coincide, the hidden ones as wider stripes."""
    axes.update_datalim([(0, bound) for bound in bounds], updatex=False)
    axes.axhline(statistic.unchanged, color=INK, linewidth=0.8, zorder=1)
    names = [name for name in styles if (rows[key] == name).any()]
    for hidden in covered(rows, key, x, names, near=0.01 * (bounds[1] - bounds[0])):
        width = LINE + COVER * hidden.above
        axes.plot(hidden.x, hidden.y, color=styles[hidden.name].colour, linewidth=width, zorder=2, label=HIDDEN)
    markers, alpha = (16, 0.16) if len(names) < 5 else (10, 0.1)
    for number, name in enumerate(names):
        line, style = rows[rows[key] == name], styles[name]
        step = -(-len(line) // markers)
        axes.fill_between(line[x], line["low"], line["high"], color=style.colour, alpha=alpha, linewidth=0)
        axes.plot(
            line[x],
            line["value"],
            color=style.colour,
            marker=style.marker,
            markevery=(number * step // len(names), step),  # not all lines' markers above each other
            linestyle=style.dash,
            linewidth=LINE,
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            label=str(name),
            zorder=3,
        )
    axes.yaxis.set_major_formatter(FuncFormatter(signed if statistic.unchanged == 0 else "{:.4g}".format))
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.margins(x=0.03)
    plain(axes)


def _layer_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))


_LEGEND: Mapping[str, Any] = {"title_fontsize": 8, "handlelength": 3}


def _handles(styles: Iterable[Style]) -> list[Line2D]:
    shared: dict[str, Any] = {"linewidth": LINE, "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.5}
    return [Line2D([], [], color=s.colour, marker=s.marker, linestyle=s.dash, **shared) for s in styles]


def _legend(figure: Figure, names: Sequence[str], styles: Iterable[Style], title: str) -> None:
    """Below the panels, in as many columns as fit."""
    inches = 0.6 + 0.08 * max(len(name) for name in names)
    if any(line.get_label() == HIDDEN for axes in figure.axes for line in axes.get_lines()):
        title += "\nstripes: lines on top of each other"
    columns = int(np.clip(figure.get_figwidth() // inches, 1, len(names)))
    legend(figure, _handles(styles), names, loc="outside lower center", ncols=columns, title=title, **_LEGEND)
