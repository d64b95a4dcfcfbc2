"""What all pages share: one file each, which carries the drawing library with it and opens in a browser offline."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from ssm_interp.plots.style import INK, token_label

CONFIG = {
    "displaylogo": False,
    "showSendToCloud": False,  # numbers stay on the reader's machine
    "modeBarButtonsToRemove": ["select2d", "lasso2d"],
    "responsive": True,
}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title></head>
<body style="margin: 0 auto; max-width: {width}px; font-family: sans-serif; color: {ink}">
<h1 style="font-size: 1.2em; margin: 1em">{title}</h1>
{body}
</body>
</html>
"""


def page(figure: Any, title: str, area: int, width: int) -> str:
    """A page around a figure whose panels and the gaps between them are `area` pixels high."""
    margin = {"l": 80, "r": 30, "t": 110, "b": 130}
    figure.update_layout(height=area + margin["t"] + margin["b"], margin=margin, template="plotly_white")
    figure.update_layout(font={"color": INK})
    body = figure.to_html(full_html=False, include_plotlyjs=True, include_mathjax=False, div_id="figure", config=CONFIG)
    return PAGE.format(title=escape(title), width=width, ink=INK, body=body)


def colour_bar(colours: str, low: float, high: float, label: str, meaning: str = "") -> dict[str, Any]:
    """A colour axis between two numbers, with what its colours mean."""
    words = "<br>".join(escape(part) for part in (label, meaning) if part)
    return {"colorscale": colours, "cmin": low, "cmax": high, "colorbar": {"title": {"text": words, "side": "right"}}}


def token_labels(tokens: Sequence[str]) -> list[str]:
    """A label per position that no other position has: its number and its token."""
    return [escape(f"{index} {token_label(token)}") for index, token in enumerate(tokens)]
