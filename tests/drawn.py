"""Summaries and sweeps made up for pictures, and a check that a figure can be drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.figure import Figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    return buffer.getvalue()


def summary(
    models: Sequence[str],
    sources: Sequence[str],
    targets: Sequence[str] = ("last",),
    *,
    layers: int = 4,
    groups: Sequence[str] = ("all",),
    sizes: Sequence[int] = (1,),
) -> pd.DataFrame:
    """Random numbers in the columns of `summarise`; windows start at every layer at which they fit."""
    rng = np.random.default_rng(0)
    keys = [
        (*names, layer, layer, size)
        for *names, size in product(models, sources, targets, groups, sizes)
        for layer in range(layers - size + 1)
    ]
    columns = ["model", "source", "target", "feature_group", "layer", "window_start", "window_size"]
    frame = pd.DataFrame(keys, columns=columns).assign(n=12, n_first=0, level=0.95)
    names = [("mean", "low", "high"), ("median", "median_low", "median_high")]
    names += [(name, f"{name}_low", f"{name}_high") for name in ("logprob_difference", "accuracy")]
    for value, low, high in names:
        frame[value] = rng.uniform(-0.2, 0.8, len(frame))
        frame[low], frame[high] = frame[value] - 0.03, frame[value] + 0.04
    return frame


def positions(values: np.ndarray, *, p_base: float = 0.5, model: str = "m") -> pd.DataFrame:
    """Rows of a sweep over token positions, `[token, window]` of changes; NaN: no edges."""
    return pd.DataFrame(
        {
            "prompt_id": "p0",
            "model": model,
            "source": str(token),
            "target": "last",
            "feature_group": "all",
            "layer": window,
            "n_edges": 0 if np.isnan(value) else 1,
            "p_base": p_base,
            "p": p_base + (0.0 if np.isnan(value) else value),
        }
        for (token, window), value in np.ndenumerate(values)
    )
