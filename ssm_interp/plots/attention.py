"""The SSM attention matrix as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ssm_interp.plots.style import FAINT, INK, MOST_LABELS, picture, token_label


def attention_figure(
    attention: Float[Tensor, "t s"],
    tokens: Sequence[str],
    *,
    title: str = "",
    label: str = "Attention",
    ax: Axes | None = None,
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
        ax: draw into these axes.

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
    axes = picture(side + 2.0, side + 1.4).subplots() if ax is None else ax
    image = axes.imshow(
        values, cmap="RdBu_r" if signed else "Blues", vmin=-largest if signed else 0.0, vmax=largest, aspect="equal"
    )
    _token_axes(axes, tokens)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.7, aspect=8 * side**0.5, pad=0.02)
    bar.set_label(label, fontsize=9, parse_math=False)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    axes.set_title(title, fontsize=10, color=INK, parse_math=False)
    return axes.figure.figure


def _token_axes(axes: Axes, tokens: Sequence[str]) -> None:
    every = -(-len(tokens) // MOST_LABELS)
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
