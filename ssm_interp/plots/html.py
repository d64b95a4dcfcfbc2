"""The same pictures as pages that answer to the mouse: one file each, which opens in a browser offline."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from ssm_interp.plots.flow import FLOW_KEYS
from ssm_interp.plots.heatmap import LABEL, MEANING, TokenMap, colour_limit
from ssm_interp.plots.page import colour_bar, page
from ssm_interp.plots.panels import (
    Covered,
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
from ssm_interp.plots.style import ARROW, CHANGED, INK, Style, readable, source_styles, token_label

MARKERS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "X": "x",
    "P": "cross",
    "<": "triangle-left",
    ">": "triangle-right",
}
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}


def flow_page(
    summary: pd.DataFrame,
    *,
    x_labels: Mapping[str, str] | None = None,
    statistic: StatisticName = "mean",
    title: str = "Information flow",
) -> str:
    """`flow_figure` as an interactive page.

    Pointing at a line tells the model, source, target, window, value, interval and number of prompts; a click on a
    source in the legend hides it in all panels, a double click all others; dragging zooms.

    Args:
        summary, x_labels, statistic: as of `flow_figure`.
        title: over the page.

    Returns:
        HTML of about 5 MB, since it carries the drawing library with it and fetches nothing.

    Raises:
        PlotError: no rows, missing columns, an unknown statistic.

    Example:
        >>> Path("flow.html").write_text(flow_page(result.summary()), encoding="utf-8")     # doctest: +SKIP
    """
    rows, chosen = drawable(summary, statistic)
    layout = arrange(rows, FLOW_KEYS)
    height, width = layout.shape
    gap = 90 + 20 * len(layout.panels[0].lane)
    area = 300 * height + gap * (height - 1)
    figure = make_subplots(
        height,
        width,
        shared_yaxes="all",
        subplot_titles=_grid_titles(layout),
        vertical_spacing=gap / area if height > 1 else 0,
        horizontal_spacing=min(0.05, 0.3 / width),
    )
    styles, drawn = source_styles(rows["source"].unique()), set[str]()
    low, high = value_range(rows, chosen)
    near = 0.01 * (high - low)
    for panel in layout.panels:
        where = {"row": panel.row + 1, "col": panel.column + 1}
        hidden = [*covered(panel.rows, "source", "layer", [s for s in styles if s in set(panel.rows["source"])], near)]
        for stripe in hidden:
            figure.add_trace(_stripe(stripe, styles[stripe.name]), **where)
        for source, line in panel.rows.groupby("source", sort=False):
            figure.add_traces(
                _traces(source, line, styles[source], chosen, first=source not in drawn),
                [where["row"]] * 2,
                [where["col"]] * 2,
            )
            drawn.add(source)
        if layout.lowest(panel):
            own = layer_label(panel.rows)
            x_label = (x_labels or {}).get(panel.rows["model"].iloc[0], own)
            figure.update_xaxes(title_text=escape(x_label), **where)
    figure.update_yaxes(title_text=chosen.label, col=1)
    figure.update_yaxes(zerolinecolor=INK, range=[low - 3 * near, high + 3 * near])
    figure.update_xaxes(zeroline=False)
    legend = {"text": legend_title("Source knocked out", chosen, rows), "side": "top"}
    figure.update_layout(legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "title": legend})
    if layout.across != "model":  # the same layers in all panels
        figure.update_xaxes(matches="x").layout.xaxis.matches = None
        title = f"{title}: {rows['model'].iloc[0]}, {header(rows)}"
    return page(figure, title, area, max(700, 420 * width))


def _grid_titles(layout: Layout) -> list[str]:
    """Over each panel, in the order of the grid, what tells it from the others."""
    titles = {(panel.row, panel.column): _title(panel, layout) for panel in layout.panels}
    height, width = layout.shape
    return [titles.get((row, column), "") for row in range(height) for column in range(width)]


def _title(panel: Panel, layout: Layout) -> str:
    count = (header(panel.rows),) if layout.across == "model" else ()
    return "<br>".join(escape(words) for words in (", ".join((panel.across, *count)), *panel.lane))


def _traces(source: str, line: pd.DataFrame, style: Style, statistic: Statistic, *, first: bool) -> list[Any]:
    """A line with its hover texts, and its band."""
    shared = {"legendgroup": source, "name": readable(source)}
    bounded = line.dropna(subset=["low", "high"])
    band = go.Scatter(
        x=[*bounded["layer"], *bounded["layer"][::-1]],
        y=[*bounded["high"], *bounded["low"][::-1]],
        fill="toself",
        fillcolor=style.colour,
        opacity=0.16,
        mode="none",
        hoverinfo="skip",
        showlegend=False,
        **shared,
    )
    curve = go.Scatter(
        x=list(line["layer"]),
        y=list(line["value"]),
        mode="lines+markers",
        line={"color": style.colour, "dash": DASHES.get(str(style.dash), "longdash")},
        marker={"symbol": MARKERS[style.marker], "size": 7},
        text=[_hover(row, statistic) for _, row in line.iterrows()],
        hovertemplate="%{text}<extra></extra>",
        showlegend=first,
        **shared,
    )
    return [band, curve]


def _stripe(hidden: Covered, style: Style) -> Any:
    """Where other lines run on top of one, it stands out on both sides."""
    return go.Scatter(
        x=[None if np.isnan(x) else x for x in hidden.x],
        y=[None if np.isnan(y) else y for y in hidden.y],
        mode="lines",
        line={"color": style.colour, "width": 2 + 2.5 * hidden.above},
        hoverinfo="skip",
        showlegend=False,
        legendgroup=hidden.name,
        name=readable(hidden.name),
    )


def _hover(row: pd.Series, statistic: Statistic) -> str:
    size = int(row["window_size"])
    features = "" if row["feature_group"] == "all" else f"features: {row['feature_group']}\n"
    bounds = f", {100 * row['level']:g} % interval {row['low']:.4g} to {row['high']:.4g}"
    text = (
        f"{row['model']}\n{readable(row['source'])} {ARROW} {readable(row['target'])}\n{features}"
        f"{size} layer{'' if size == 1 else 's'} from layer {row['window_start']}\n"
        f"{row['value']:.4g} ({statistic.line}){'' if pd.isna(row['low']) else bounds}\n{header(row.to_frame().T)}"
    )
    return escape(text).replace("\n", "<br>")


def heatmap_page(*maps: TokenMap, limit: float | None = None, title: str = "Source tokens over the layers") -> str:
    """`heatmap_figure` as an interactive page: pointing at a cell tells the token, the window and the change.

    Args:
        maps, limit: as of `heatmap_figure`.
        title: over the page.

    Returns:
        HTML of about 5 MB, since it carries the drawing library with it and fetches nothing.

    Raises:
        PlotError: no maps; a limit that is not positive.

    Example:
        >>> Path("tokens.html").write_text(heatmap_page(token_map), encoding="utf-8")       # doctest: +SKIP
    """
    end = colour_limit(maps, limit)
    heights, gap = [60 + 20 * len(token_map.tokens) for token_map in maps], 120
    area = sum(heights) + gap * (len(maps) - 1)
    parts = ((token_map.title, token_map.caption, token_map.note.replace("\n", " ")) for token_map in maps)
    titles = ["<br>".join(escape(part) for part in shown if part) for shown in parts]
    spacing = gap / area if len(maps) > 1 else 0
    figure = make_subplots(len(maps), 1, subplot_titles=titles, row_heights=heights, vertical_spacing=spacing)
    for row, token_map in enumerate(maps, start=1):
        figure.add_trace(_cells(token_map), row, 1)
        labels = [_row_label(token_map, index) for index in range(len(token_map.tokens))]
        figure.update_yaxes(tickvals=list(range(len(labels))), ticktext=labels, autorange="reversed", row=row)
        figure.update_xaxes(type="category", title_text=token_map.layer_label, row=row)
    figure.update_yaxes(tickfont={"family": "monospace"}, title_text="Source token (bold: the subject)", showgrid=False)
    figure.update_layout(coloraxis=colour_bar(CHANGED, -end, end, LABEL, MEANING))
    return page(figure, title, area, 1000)


def _cells(token_map: TokenMap) -> Any:
    texts = [
        [_cell(token_map, row, column) for column in range(len(token_map.layers))]
        for row in range(len(token_map.tokens))
    ]
    return go.Heatmap(
        z=token_map.values.astype(float).tolist(),
        x=[str(layer) for layer in token_map.layers],
        y=list(range(len(token_map.tokens))),
        text=texts,
        hovertemplate="%{text}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
    )


def _cell(token_map: TokenMap, row: int, column: int) -> str:
    change, clean = token_map.values[row, column], token_map.p_base
    after = "" if clean is None else f": {clean:.4g} to {clean + change:.4g}"
    token = escape(token_label(token_map.tokens[row]))
    return f"token {row} {token}<br>window at layer {token_map.layers[column]}<br>{change:+.4g}{after}"


def _row_label(token_map: TokenMap, row: int) -> str:
    label = escape(token_label(token_map.tokens[row]))
    return f"<b>{label}</b>" if row in token_map.subject else label
