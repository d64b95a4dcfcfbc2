"""What each layer writes to the logits, by source token, as a heat map."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from ssm_interp.errors import PlotError
from ssm_interp.plots.cells import centred, colour_bar, extent, layer_cells, nothing, say_nothing
from ssm_interp.plots.style import SIZES, WRITTEN, headline, picture

MEANING = "(blue: supports the answer, red: opposes it)"


def attribution_figure(
    values: Float[Tensor, "l s"],
    tokens: Sequence[str],
    layers: Sequence[int],
    *,
    subject: Collection[int] = (),
    signed: bool = True,
    scale: float | None = None,
    title: str = "",
    label: str = "Written to the logit difference (logits)",
    ax: Axes | None = None,
) -> Figure:
    """Heat map of what layers write to a logit difference: a row per source token, a column per layer.

    Blue speaks for the answer, red for the other token, white for neither.

    Args:
        values: attributions `[l s]`, such as `logit_attribution(...).by_position()[0].sum(1)`.
        tokens: a readable token per position.
        layers: the layer of each column.
        subject: positions whose tokens are set in bold.
        signed: whether values speak for and against; False: they are sizes, from white at 0 to dark blue.
        scale: the logit difference itself; values below a millionth of it are drawn as nothing, and the map says so.
        title: over the picture; a reader wants the model, the answer and the other token.
        label: of the colour bar.
        ax: draw into these axes.

    Raises:
        PlotError: values of another shape, or that are not finite; negative sizes; a subject outside the prompt.

    Example:
        >>> attribution_figure(logits.by_position()[0].sum(1), tokens, logits.layers).savefig("x.png")  # doctest: +SKIP
    """
    wanted = [len(layers), len(tokens)]
    if list(values.shape) != wanted or 0 in wanted:
        raise PlotError(
            f"attributions must be [layer source] = {wanted} for {wanted[0]} layers and {wanted[1]} tokens, got "
            f"{list(values.shape)}"
        )
    if not signed and (values < 0).any():
        raise PlotError("sizes are not negative, and some of these are; leave out signed=False")
    if not values.isfinite().all():
        raise PlotError("the attributions have entries that are not finite numbers")
    if outside := [position for position in subject if not 0 <= position < len(tokens)]:
        raise PlotError(f"the subject has position {outside[0]}, but there are {len(tokens)} tokens")
    shown = values.detach().double().cpu().T.numpy()
    width, height = extent(len(layers), each=0.3, least=2.8, most=9.0), extent(len(tokens))
    axes = picture(width + 3.4, height + 1.2).subplots() if ax is None else ax
    largest = float(abs(shown).max())
    note = nothing(largest, scale and abs(scale), "the logit difference")
    end = abs(scale or 1.0) if note else largest
    colours: dict[str, Any] = {"cmap": WRITTEN, "norm": centred(end)}
    if not signed:
        colours = {"cmap": SIZES, "norm": Normalize(0.0, end)}
    image = layer_cells(axes, shown, tokens, layers, subject=subject, **colours)
    colour_bar(image, axes, label, meaning=MEANING if signed else "")
    if note:
        say_nothing(axes, note)
    headline(axes, title)
    return axes.figure.figure
