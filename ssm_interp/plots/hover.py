"""Attention, single edges and circuits as pages that answer to the mouse."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.bezier import BezierSegment
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from ssm_interp.errors import PlotError
from ssm_interp.plots.attention import SIGNS, checked_attention
from ssm_interp.plots.cells import nothing
from ssm_interp.plots.circuit import HEIGHT, THICKEST, THINNEST, arrow_path, checked_roles
from ssm_interp.plots.edges import EDGE_LABEL, MEANING
from ssm_interp.plots.page import colour_bar, page, token_labels
from ssm_interp.plots.panels import LAYER
from ssm_interp.plots.style import ARROW, CHANGED, FAINT, INK, SIZES, WRITTEN, readable, sign_colour

BENDS = 25  # points of an arrow
ABOVE, BELOW = 30, 150  # pixels between a map and its controls: a title, and token labels that stand upright
CELL = 22  # pixels of a token's row
EDGE_COLUMNS = ("layer", "source", "target", "attribution")
DASHES = ("solid", "longdash", "dot", "dashdot")


def attention_page(
    values: Float[Tensor, "t s"], tokens: Sequence[str], title: str = "", *, label: str = "Attention"
) -> str:
    """`attention_figure` as an interactive page: pointing at a cell tells the target, the source and the entry.

    Args:
        values, tokens, label: as of `attention_figure`.
        title: over the page; a reader wants the model and the layer.

    Returns:
        HTML of about 5 MB, since it carries the drawing library with it and fetches nothing.

    Raises:
        PlotError: as `attention_figure`.

    Example:
        >>> Path("attention.html").write_text(attention_page(run["attn", 3][0].mean(0), tokens))    # doctest: +SKIP
    """
    matrix = checked_attention(values, tokens)
    largest = float(abs(matrix).max())
    signed = bool((matrix < 0).any())
    names = token_labels(tokens)
    figure = go.Figure(_map(_causal(matrix), names, names, "target %{y}<br>source %{x}<br>%{z:.4g}"))
    figure.update_xaxes(title_text="Source token", type="category")
    figure.update_yaxes(title_text="Target token", type="category", autorange="reversed")
    axis = colour_bar(WRITTEN if signed else SIZES, -largest if signed else 0.0, largest or 1.0, label, SIGNS * signed)
    figure.update_layout(coloraxis=axis)
    heading = f"{title} ({nothing(largest, None, '')})" if not largest else title
    return page(_monospace(figure), heading or label, 120 + CELL * len(tokens), 900)


def edges_page(
    frame: pd.DataFrame,
    tokens: Sequence[str],
    title: str = "",
    *,
    target: int = -1,
    scale: float | None = None,
    label: str = EDGE_LABEL,
) -> str:
    """`edge_figure` as an interactive page, in which the target of the left map and the layer of the right are chosen.

    Pointing at a cell tells the layer, the target, the source and what the edge is worth.

    Args:
        frame: a row per edge, with `layer`, `source` and `target` (positions) and `attribution`, as
            `EdgeAttribution.frame` has; of one row of the batch, and one feature group.
        tokens: a readable token per position.
        title: over the page; a reader wants the model and the metric.
        target: the position whose edges the left map shows at first.
        scale, label: as of `edge_figure`.

    Returns:
        HTML of about 5 MB, and 16 bytes per edge.

    Raises:
        PlotError: missing columns, no rows; several rows or feature groups; a position outside the tokens; numbers
            that are not finite.

    Example:
        >>> Path("edges.html").write_text(edges_page(attribution.frame, tokens))      # doctest: +SKIP
    """
    cube, layers = _cube(frame, tokens)
    if not -len(tokens) <= target < len(tokens):
        raise PlotError(f"the target is position {target}, but there are {len(tokens)} tokens")
    names, numbers = token_labels(tokens), [str(layer) for layer in layers]
    figure = make_subplots(1, 2, subplot_titles=["Edges into one token", "All edges"], horizontal_spacing=0.14)
    chosen = target % len(names)
    _edge_maps(figure, cube, numbers, names, chosen)
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_xaxes(title_text=LAYER, col=1).update_yaxes(title_text="Source token", col=1)
    figure.update_xaxes(title_text="Source token", col=2).update_yaxes(title_text="Target token", col=2)
    largest = float(np.nanmax(np.abs(cube)))
    note = nothing(largest, scale and abs(scale), "the metric").replace("\n", " ")
    end = abs(scale or 1.0) if note else largest
    figure.update_layout(coloraxis=colour_bar(CHANGED, -end, end, label, MEANING))
    figure.update_layout(updatemenus=[_menu(names, chosen)], sliders=[_slider(numbers, len(names))])
    heading = f"{title} ({note})" if note else title
    return page(_monospace(figure), heading or "What single edges are worth", 160 + CELL * len(tokens), 1300)


def circuit_page(
    frame: pd.DataFrame, *, roles: Sequence[str] | None = None, title: str | None = None, metric: str = "the metric"
) -> str:
    """`circuit_figure` as an interactive page: pointing at an arrow tells its layer, edge, features and effect.

    Args:
        frame, roles, title, metric: as of `circuit_figure`.

    Returns:
        HTML of about 5 MB, since it carries the drawing library with it and fetches nothing.

    Raises:
        PlotError: as `circuit_figure`.

    Example:
        >>> Path("circuit.html").write_text(circuit_page(circuit.frame, roles=circuit.roles))     # doctest: +SKIP
    """
    columns, layers = checked_roles(frame, roles), sorted(map(int, frame["layer"].unique()))
    kept = frame[frame["kept"].astype(bool)]
    figure = go.Figure()
    for column in range(len(columns)):
        stream = {"x0": column, "x1": column, "y0": -0.35, "y1": len(layers), "line": {"color": FAINT, "width": 6}}
        figure.add_shape(type="line", layer="below", **stream)
    largest, groups = kept["effect"].abs().max() or 1.0, list(dict.fromkeys(kept["feature_group"]))
    for row in kept.to_dict("records"):
        ends = (columns.index(row["source"]), columns.index(row["target"]), layers.index(row["layer"]))
        width = max(THINNEST, THICKEST * float(np.sqrt(abs(row["effect"]) / largest)))
        figure.add_trace(_arrow(ends, row, width, groups.index(row["feature_group"]), metric))
    for group, dash in zip(groups if len(groups) > 1 else (), cycle(DASHES)):
        options = {
            "mode": "lines",
            "line": {"color": INK, "dash": dash},
            "name": escape(str(group)),
            "showlegend": True,
        }
        figure.add_trace(go.Scatter(x=[None], y=[None], **options))
    names = [escape(readable(role)) for role in columns]
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=names, range=[-0.6, len(names) - 0.4])
    middles = [floor + HEIGHT / 2 for floor in range(len(layers))]
    figure.update_yaxes(tickvals=middles, ticktext=list(map(str, layers)), range=[-0.45, len(layers) + 0.2])
    figure.update_xaxes(showgrid=False, zeroline=False, title_text="Role of the token")
    figure.update_yaxes(showgrid=False, zeroline=False, title_text=LAYER)
    meaning = f"width: change of {metric} if the edges are removed; blue: they support it, red: they oppose it"
    figure.update_layout(title={"text": escape(meaning), "font": {"size": 12}}, legend={"title": {"text": "Features"}})
    heading = title or f"{len(kept)} of {len(frame)} edge groups"
    return page(figure, heading.replace("\n", ", "), 60 + 60 * len(layers), max(700, 200 + 150 * len(columns)))


def _arrow(ends: tuple[int, int, int], row: dict[Any, Any], width: float, group: int, metric: str) -> Any:
    """A curve with a head at its end, which answers to the mouse along its way."""
    along = BezierSegment(arrow_path(*ends, group).vertices)(np.linspace(0, 1, BENDS))
    effect = float(row["effect"])
    features = "" if row["feature_group"] == "all" else f"\nfeatures: {row['feature_group']}"
    edge = f"{readable(row['source'])} {ARROW} {readable(row['target'])}"
    text = f"layer {row['layer']}\n{edge}{features}\n{effect:+.4g}: change of {metric} if removed"
    head = {"symbol": "arrow", "angleref": "previous", "size": [0] * (BENDS - 1) + [10 + 2 * width], "opacity": 1}
    return go.Scatter(
        x=[round(float(x), 4) for x in along[:, 0]],
        y=[round(float(y), 4) for y in along[:, 1]],
        mode="lines+markers",
        line={"color": sign_colour(effect), "width": width, "dash": DASHES[group % len(DASHES)]},
        marker=head | {"color": sign_colour(effect)},
        text=escape(text).replace("\n", "<br>"),
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _cube(frame: pd.DataFrame, tokens: Sequence[str]) -> tuple[Float[np.ndarray, "l t s"], list[int]]:
    """Values by layer, target and source, NaN where there is no edge; and the layers."""
    if missing := [column for column in EDGE_COLUMNS if column not in frame.columns]:
        raise PlotError(f"a page of edges needs the columns {list(EDGE_COLUMNS)}; these are missing: {missing}")
    if frame.empty:
        raise PlotError("a page of edges needs at least one edge; the table has no rows")
    for column in ("row", "feature_group"):
        if column in frame.columns and frame[column].nunique() > 1:
            raise PlotError(f"a page of edges shows one {column}, but this table has several; choose one")
    furthest = int(frame[["source", "target"]].to_numpy().max())
    if furthest >= len(tokens):
        raise PlotError(f"the table has an edge of position {furthest}, but there are {len(tokens)} tokens")
    values = frame["attribution"].to_numpy(float)
    if not np.isfinite(values).all():
        raise PlotError("the attributions of a page of edges must be finite; some are not")
    layers = sorted(map(int, frame["layer"].unique()))
    cube = np.full((len(layers), len(tokens), len(tokens)), np.nan)
    cube[np.searchsorted(layers, frame["layer"]), frame["target"], frame["source"]] = values
    return cube, layers


def _edge_maps(
    figure: Any, cube: Float[np.ndarray, "l t s"], layers: Sequence[str], names: Sequence[str], target: int
) -> None:
    """A trace per target on the left; on the right one of the strongest layer of each edge, then one per layer."""
    hover = "layer %{x}<br>target %{meta}<br>source %{y}<br>%{z:+.4g}"
    for index, name in enumerate(names):
        figure.add_trace(_map(cube[:, index].T, layers, names, hover, meta=name, visible=index == target), 1, 1)
    strongest = np.nan_to_num(np.abs(cube)).argmax(0)
    values, where = np.take_along_axis(cube, strongest[None], 0)[0], np.array(layers)[strongest].tolist()
    hover = "layer %{text}<br>target %{y}<br>source %{x}<br>%{z:+.4g}"
    figure.add_trace(_map(values, names, names, hover, text=where), 1, 2)
    for layer, values in zip(layers, cube, strict=True):
        hover = "layer %{meta}<br>target %{y}<br>source %{x}<br>%{z:+.4g}"
        figure.add_trace(_map(values, names, names, hover, meta=layer, visible=False), 1, 2)


def _causal(matrix: Float[np.ndarray, "t s"]) -> Float[np.ndarray, "t s"]:
    return np.where(np.tri(len(matrix), dtype=bool), matrix, np.nan)


def _map(values: Float[np.ndarray, "y x"], x: Sequence[str], y: Sequence[str], hover: str, **options: Any) -> Any:
    shown = {"hovertemplate": f"{hover}<extra></extra>", "hoverongaps": False, "coloraxis": "coloraxis"}
    return go.Heatmap(z=values.astype(np.float32), x=list(x), y=list(y), **(shown | options))


def _menu(names: Sequence[str], chosen: int) -> dict[str, Any]:
    """Which target the left map shows: of its traces, which come first, one is visible."""
    traces = list(range(len(names)))
    buttons = [
        {"label": f"into {name}", "method": "restyle", "args": [{"visible": [t == index for t in traces]}, traces]}
        for index, name in enumerate(names)
    ]
    where = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": ABOVE}}
    return {"buttons": buttons, "active": chosen, **where}


def _slider(numbers: Sequence[str], before: int) -> dict[str, Any]:
    """Which layer the right map shows: the strongest of each edge, or one; its traces follow `before` others."""
    names = ["strongest", *numbers]
    traces = [before + index for index in range(len(names))]
    steps = [
        {"label": name, "method": "restyle", "args": [{"visible": [t == trace for t in traces]}, traces]}
        for name, trace in zip(names, traces, strict=True)
    ]
    where = {"x": 0.57, "len": 0.43, "y": 0, "yanchor": "top", "pad": {"t": BELOW}}
    return {"steps": steps, "currentvalue": {"prefix": "layer: "}, **where}


def _monospace(figure: Any) -> Any:
    """Axes that name tokens, with as much room as their labels take."""
    options = {"showgrid": False, "automargin": True}
    return figure.update_yaxes(tickfont={"family": "monospace"}, **options).update_xaxes(**options)
