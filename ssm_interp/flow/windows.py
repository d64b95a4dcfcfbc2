"""Layer windows: the runs of layers in which a sweep knocks edges out, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssm_interp.errors import FlowError, WindowError
from ssm_interp.experiments.values import Align


@dataclass(frozen=True)
class Window:
    """A run of consecutive SSM layers.

    Attributes:
        at: the layer that it is drawn at: its first one (aligned left), or the one that it is centred on.
        layers: the model's layer numbers in it, ascending.
        size: w, how many layers it was to have; a centred one has fewer at the ends.
    """

    at: int
    layers: tuple[int, ...]
    size: int


def windows(layers: Sequence[int], size: int, align: Align = "left") -> list[Window]:
    """All windows of `size` layers over a model's SSM layers.

    Args:
        layers: the model's layer numbers that windows run over (in a hybrid maybe not all), ascending; n of them.
        size: w, the number of layers in a window.
        align: `"left"`: windows start at s = 0 .. n-w and are never truncated, n-w+1 of them (Endy et al. 2025).
            `"centre"`: windows of `range(max(0, l - w//2), min(n, l - (-w//2)))` for l = 0 .. n-1, truncated at both
            ends, n of them (Geva et al. 2023).

    Raises:
        WindowError: no layers; a size below 1 or above n.
        FlowError: another alignment.

    Example:
        >>> [window.layers for window in windows(range(4), 3)]
        [(0, 1, 2), (1, 2, 3)]
        >>> [window.layers for window in windows(range(4), 3, "centre")]
        [(0, 1), (0, 1, 2), (1, 2, 3), (2, 3)]
    """
    layers = tuple(layers)
    n = len(layers)
    if not 1 <= size <= n:
        raise WindowError(f"a window of {size} layers does not fit: this model has {n} of them; give 1 to {n}")
    if align == "left":
        return [Window(layers[s], layers[s : s + size], size) for s in range(n - size + 1)]
    if align == "centre":
        return [Window(layers[i], layers[max(0, i - size // 2) : min(n, i - (-size // 2))], size) for i in range(n)]
    raise FlowError(f"there is no alignment {align!r}: a window is aligned 'left' or 'centre'")


def default_size(layers: Sequence[int]) -> int:
    """Three layers in eight, rounded, at least one: the share that the paper's window of 9 has of a model of 24 layers.

    Example:
        >>> default_size(range(10)), default_size(range(24)), default_size(range(1))
        (4, 9, 1)
    """
    return max(1, round(len(layers) * 9 / 24))
