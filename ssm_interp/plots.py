"""Pictures, as Matplotlib figures; nothing here touches pyplot or its global state. Save them with `.savefig(path)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

# Okabe and Ito's colours, told apart with any colour vision; marker and dash differ too, for print in grey.
STYLES: Mapping[str, tuple[str, str, Any]] = {
    "subject": ("#0072B2", "o", "-"),
    "relation": ("#D55E00", "s", "--"),
    "first": ("#009E73", "^", ":"),
    "last": ("#CC79A7", "D", "-."),
    "context": ("#E69F00", "v", (0, (5, 1))),
    "all": ("#000000", "X", "-"),
    "relation_minus_last": ("#A0522D", "P", (0, (3, 1, 1, 1))),
    "subject_first": ("#56B4E9", "<", (0, (1, 1))),
    "subject_last": ("#332288", ">", (0, (4, 2))),
}
OTHER = ("#666666", "h", "-")
INK, FAINT = "#222222", "#DDDDDD"


def flow_figure(summary: pd.DataFrame, *, x_labels: Mapping[str, str] | None = None) -> Figure:
    """Information flow: mean relative change of the target's probability over the layer windows.

    A panel per model, side by side; a row per target role, if there are several; in each a line per source role with
    the 95 % interval of its mean as a band.

    Args:
        summary: rows as from `FlowResult.summary`: the columns model, source, target, layer, n, mean, low, high.
        x_labels: what the layer axis says, per model.

    Raises:
        ValueError: no rows, or missing columns.

    Example:
        >>> flow_figure(result.summary()).savefig("flow.png", dpi=200)      # doctest: +SKIP
    """
    needed = ["model", "source", "target", "layer", "n", "mean", "low", "high"]
    if missing := [column for column in needed if column not in summary.columns]:
        raise ValueError(f"a flow figure needs a summary with the columns {needed}; these are missing: {missing}")
    if summary.empty:
        raise ValueError("a flow figure needs at least one row; the summary is empty")
    models, targets = list(summary["model"].unique()), list(summary["target"].unique())
    sources = list(summary["source"].unique())
    size = (0.9 + 4.1 * len(models), 0.9 + 3.1 * len(targets))
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    grid = figure.subplots(len(targets), len(models), sharey="row", squeeze=False)
    for row, target in enumerate(targets):
        for column, model in enumerate(models):
            rows = summary[(summary["model"] == model) & (summary["target"] == target)]
            axes = grid[row, column]
            _flow_panel(axes, rows)
            if row == 0:
                prompts = "prompt" if (n := int(rows["n"].max())) == 1 else "prompts"
                axes.set_title(f"{_short(str(model))}   ({n} {prompts})", fontsize=10, color=INK, parse_math=False)
            if row == len(targets) - 1:
                axes.set_xlabel((x_labels or {}).get(model, "Layer of the window"), fontsize=9, parse_math=False)
            if column == 0:
                cut = f"source \N{RIGHTWARDS ARROW} {_readable(target)}"
                axes.set_ylabel(f"Relative change of the answer's probability (%)\nwith {cut} knocked out", fontsize=9)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        lines, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, lines, strict=True))
    labels = [_readable(source) for source in sources]
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 2 + 3 * len(models)),
        frameon=False,
        title="Source (line: mean over prompts, band: its 95 % interval)",
        title_fontsize=8,
        fontsize=9,
        handlelength=3,
    )
    return figure


def _flow_panel(axes: Axes, rows: pd.DataFrame) -> None:
    axes.axhline(0, color=INK, linewidth=0.8, zorder=1)
    for source, line in rows.sort_values("layer").groupby("source", sort=False):
        colour, marker, dash = STYLES.get(str(source), OTHER)
        axes.fill_between(line["layer"], line["low"], line["high"], color=colour, alpha=0.16, linewidth=0)
        axes.plot(
            line["layer"],
            line["mean"],
            color=colour,
            marker=marker,
            linestyle=dash,
            linewidth=1.6,
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            label=_readable(str(source)),
            zorder=3,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(_signed))
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)
    axes.margins(x=0.03)


def _short(name: str, most: int = 36) -> str:
    return name if len(name) <= most else f"…{name[-most + 1 :]}"


def _signed(value: float, _: object) -> str:
    return f"{value:+.4g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def _readable(role: str) -> str:
    return role.replace("_", " ")


def attention_figure(
    attention: Float[Tensor, "t s"], tokens: Sequence[str], *, title: str = "", label: str = "Attention"
) -> Figure:
    """Heat map of an attention matrix: a row per target position, a column per source position.

    A matrix with negative entries gets a diverging colour map centred on 0, another one a sequential map from 0. What
    lies above the diagonal (a target before its source) is left blank. On a long text every second, third, ... token is
    labelled.

    Args:
        attention: a lower-triangular matrix, `[t, s]`; a head's, or a reduction over heads.
        tokens: a readable token per position; a space is shown as a middle dot.
        title: over the picture.
        label: of the colour bar.

    Raises:
        ValueError: a matrix that is not square or is empty; another number of tokens; entries that are not finite.

    Example:
        >>> attention_figure(run["attn", 3][0].mean(0), tokens).savefig("attention.png")    # doctest: +SKIP
    """
    shape = list(attention.shape)
    if attention.ndim != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(f"an attention heat map needs a square matrix [t, s], got {shape}")
    if len(tokens) != shape[0]:
        raise ValueError(f"the attention matrix is {shape}, but there are {len(tokens)} tokens; give one per position")
    values = attention.detach().double().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError("the attention matrix has entries that are not finite numbers")
    values = np.ma.masked_array(values, mask=np.triu(np.ones(shape, dtype=bool), k=1))
    signed, largest = bool((values < 0).any()), float(abs(values).max()) or 1.0
    side = min(max(2.6, 0.27 * len(tokens)), 11.0)
    figure = Figure(figsize=(side + 2.0, side + 1.4), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    image = axes.imshow(
        values, cmap="RdBu_r" if signed else "Blues", vmin=-largest if signed else 0.0, vmax=largest, aspect="equal"
    )
    _token_axes(axes, tokens)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=8 * side**0.5, pad=0.02)
    bar.set_label(label, fontsize=9, parse_math=False)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    axes.set_title(title, fontsize=10, color=INK, parse_math=False)
    return figure


def _token_axes(axes: Axes, tokens: Sequence[str]) -> None:
    every = -(-len(tokens) // 64)  # more labels than 64 could not be read
    places = range(0, len(tokens), every)
    labels = [token_label(tokens[place]) for place in places]
    style: dict[str, Any] = {"fontsize": 8, "family": "DejaVu Sans Mono", "parse_math": False}
    axes.set_xticks(places, labels, rotation=90, **style)
    axes.set_yticks(places, labels, **style)
    axes.set_xlabel("source (written at)", fontsize=9)
    axes.set_ylabel("target (read at)", fontsize=9)
    axes.tick_params(length=2, colors=INK)
    axes.spines[:].set_visible(False)
    corners = np.arange(len(tokens) + 1) - 0.5  # of the staircase that bounds the causal half
    axes.plot(corners.repeat(2)[1:], corners.repeat(2)[:-1], color=FAINT, linewidth=0.6)


def token_label(token: str) -> str:
    """A token as a tick label: spaces as middle dots, line breaks and characters that the font lacks as escapes.

    Example:
        >>> token_label(" is"), token_label("\\n")
        ('·is', '\\\\n')
    """
    known = _glyphs()
    shown = "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in token.replace(" ", "·"))
    return shown if len(shown) <= 18 else shown[:17] + "…"


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans Mono")).get_charmap())
