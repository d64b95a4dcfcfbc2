"""Pictures of circuits: an arrow per kept edge group, wide where it matters, in the columns of its roles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pandas as pd
import pytest
from drawn import png
from matplotlib.patches import FancyArrowPatch

from ssm_interp.plots import circuit_figure

ROLES = ["context", "subject", "after", "last"]


def frame(layers: int, kept: dict[tuple[int, str, str], float], groups: Sequence[str] = ("all",)) -> pd.DataFrame:
    rows = [
        (layer, source, target, group, (layer, source, target) in kept, kept.get((layer, source, target)))
        for layer, (place, target), group in product(range(layers), enumerate(ROLES), groups)
        for source in ROLES[: place + 1]
    ]
    return pd.DataFrame(rows, columns=["layer", "source", "target", "feature_group", "kept", "effect"])


def test_an_arrow_per_edge_with_its_width_and_number() -> None:
    kept = {(0, "subject", "last"): -4.0, (1, "subject", "subject"): -1.0, (1, "after", "last"): 0.0}
    figure = circuit_figure(frame(2, kept), roles=ROLES, title="a circuit", metric="ln p (nats)")
    png(figure)
    (axes,) = figure.axes
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    assert [arrow.get_linewidth() for arrow in arrows] == [6.0, 3.0, 1.2]
    assert [text.get_text() for text in axes.texts] == ["−4", "−1", "0"]
    ends = [arrow.get_path().vertices for arrow in arrows]
    assert len({arrow.get_edgecolor() for arrow in arrows}) == 2
    assert len(ends) == 3
    assert figure.get_suptitle() == "a circuit"
    assert "change of ln p (nats) if the edges are removed" in axes.get_xlabel().replace("\n", " ")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]


def test_many_layers_and_feature_groups() -> None:
    kept = {(layer, source, "last"): -0.1 * (1 + layer) for layer in range(10) for source in ROLES}
    figure = circuit_figure(frame(10, kept, ("top third", "all but top third")))
    png(figure)
    assert len(figure.axes[0].patches) == 80
    assert not figure.axes[0].texts
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["top third", "all but top third"]
    assert figure.get_suptitle() == "80 of 200 edge groups"


def test_nothing_is_left() -> None:
    figure = circuit_figure(frame(2, {}))
    png(figure)
    assert not figure.axes[0].patches


def test_what_cannot_be_drawn_is_refused() -> None:
    whole = frame(1, {(0, "subject", "last"): -1.0})
    with pytest.raises(ValueError, match=r"these are missing: \['effect'\]"):
        circuit_figure(whole.drop(columns="effect"))
    with pytest.raises(ValueError, match="the frame has no rows"):
        circuit_figure(whole.head(0))
    with pytest.raises(ValueError, match=r"leave out \['context', 'after'\]"):
        circuit_figure(whole, roles=["subject", "last"])
    with pytest.raises(ValueError, match="must have a finite effect"):
        circuit_figure(whole.assign(effect=float("nan")))
