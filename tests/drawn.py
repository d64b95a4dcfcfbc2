"""Summaries and sweeps made up for pictures, and checks that figures can be drawn and pages read."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=60)
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
    names += [(name, f"{name}_low", f"{name}_high") for name in ("logprob_difference", "accuracy", "value_difference")]
    for value, low, high in names:
        frame[value] = rng.uniform(-0.2, 0.8, len(frame))
        frame[low], frame[high] = frame[value] - 0.03, frame[value] + 0.04
    return frame.assign(metric="kl")


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
            "window_start": window,
            "window_size": 3,
            "n_edges": 0 if np.isnan(value) else 1,
            "p_base": p_base,
            "p": p_base + (0.0 if np.isnan(value) else value),
        }
        for (token, window), value in np.ndenumerate(values)
    )


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def on_page(page: str) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """The traces, the layout and the options that the page hands to plotly."""
    call = page.rindex("Plotly.newPlot(")
    place, parts = page.index("[", call), []
    for _ in range(3):
        place = re.compile(r"[\[{]").search(page, place).start()  # type: ignore[union-attr]
        part, length = json.JSONDecoder().raw_decode(page[place:])
        parts.append(part)
        place += length
    return parts[0], parts[1], parts[2]


def check_offline(page: str) -> None:
    """Nothing is fetched: no tag has an address, the drawing library is in the page, and no number leaves it."""
    tags = Tags(page).found
    assert not [tag for tag in tags if {"src", "href", "data", "action"} & set(tag[1])]
    assert {tag for tag, _ in tags} == {"html", "head", "meta", "title", "body", "h1", "div", "script"}
    assert len(page) > 1_000_000
    assert on_page(page)[2]["showSendToCloud"] is False
    assert page.startswith("<!DOCTYPE html>")
