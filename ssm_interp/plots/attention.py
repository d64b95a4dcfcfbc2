"""The SSM attention matrix as a heat map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from ssm_interp.errors import PlotError
from ssm_interp.plots.cells import centred, colour_bar, extent, nothing, say_nothing, target_cells
from ssm_interp.plots.style import SIZES, WRITTEN, headline, picture

MOST_ACROSS = 4
SIGNS = "(blue: positive, red: negative)"


def attention_figure(
    attention: Float[Tensor, "t s"],
    tokens: Sequence[str],
    *,
    title: str = "",
    label: str = "Attention",
    ax: Axes | None = None,
) -> Figure:
    """Heat map of an attention matrix: a row per target position, a column per source position.

    A matrix with negative entries gets a diverging colour map centred on 0, blue where it is positive; another one a
    sequential map from 0. What lies above the diagonal (a target before its source) is left blank. On a long text every
    second, third, ... token is labelled.

    Args:
        attention: a lower-triangular matrix, `[t, s]`; a head's, or a reduction over heads.
        tokens: a readable token per position; a space is shown as a middle dot.
        title: over the picture; a reader wants the model and the layer.
        label: of the colour bar: what an entry is.
        ax: draw into these axes.

    Raises:
        PlotError: a matrix that is not square or is empty; another number of tokens; entries that are not finite.

    Example:
        >>> attention_figure(run["attn", 3][0].mean(0), tokens).savefig("attention.png")    # doctest: +SKIP
    """
    values = checked_attention(attention, tokens)
    largest = float(abs(values).max())
    signed = bool((values < 0).any())
    axes = attention_panels(1, len(tokens))[1][0] if ax is None else ax
    if signed:
        image = target_cells(axes, values, tokens, cmap=WRITTEN, norm=centred(largest))
    else:
        image = target_cells(axes, values, tokens, cmap=SIZES, norm=Normalize(0.0, largest or 1.0))
    colour_bar(image, axes, label, meaning=SIGNS if signed else "")
    if note := nothing(largest, None, ""):
        say_nothing(axes, note)
    headline(axes, title)
    return axes.figure.figure


def checked_attention(attention: Float[Tensor, "t s"], tokens: Sequence[str]) -> Float[np.ndarray, "t s"]:
    """The lower triangle of a matrix that can be drawn; raises as `attention_figure`."""
    shape = list(attention.shape)
    if attention.ndim != 2 or shape[0] != shape[1] or not shape[0]:
        raise PlotError(f"an attention heat map needs a square matrix [t, s], got {shape}")
    if len(tokens) != shape[0]:
        raise PlotError(f"the attention matrix is {shape}, but there are {len(tokens)} tokens; give one per position")
    if not attention.isfinite().all():
        raise PlotError("the attention matrix has entries that are not finite numbers")
    values: Float[np.ndarray, "t s"] = attention.detach().double().cpu().tril().numpy()
    return values


def attention_panels(count: int, length: int) -> tuple[Figure, list[Axes]]:
    """An empty figure with axes for so many attention matrices of so many tokens, at most four side by side."""
    across = min(count, MOST_ACROSS)
    down, side = -(-count // across), extent(length, each=0.27, least=2.6)
    figure = picture(across * (side + 2.3), down * (side + 1.4))
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]
