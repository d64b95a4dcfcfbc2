"""Token x window heat maps: the numbers, the labels, and what is refused."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from drawn import png, positions
from matplotlib.figure import Figure

from ssm_interp.plots import TokenMap, heatmap_figure

VALUES = np.array([[-0.2, -0.1, 0.0], [0.05, 0.1, np.nan]])


def token_map(values: np.ndarray = VALUES, **fields: Any) -> TokenMap:
    tokens = [f" t{index}" for index in range(values.shape[0])]
    return TokenMap(values, tokens, list(range(values.shape[1])), **fields)


def test_a_row_per_token_and_a_column_per_window_with_the_numbers() -> None:
    one = token_map(subject=[1], title="tiny $x", answer=" Paris", p_base=0.8125)
    figure = heatmap_figure(one)
    png(figure)
    axes, bar = figure.axes
    image = axes.get_images()[0]
    drawn = image.get_array()
    assert drawn is not None
    np.testing.assert_array_equal(np.ma.filled(drawn, np.nan), VALUES)
    assert image.get_clim() == (-0.2, 0.2)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["·t0", "·t1"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "2"]
    assert axes.get_title() == "tiny $x\nanswer: Paris, p = 0.812"
    plain, subject = axes.get_yticklabels()
    assert (subject.get_color(), subject.get_weight()) == (plain.get_color(), "bold")  # blue is for what supports
    assert plain.get_weight() != "bold"
    assert bar.get_ylabel().replace("\n", " ") == (
        "Change of the answer's probability (blue: the token supports the answer, red: it opposes it)"
    )


@pytest.mark.parametrize("shape", [(1, 1), (2, 63), (13, 16), (130, 56)])
def test_any_size(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(0).normal(0, 0.1, shape)
    axes = heatmap_figure(token_map(values)).axes[0]
    png(axes.figure.figure)
    assert len(axes.get_yticklabels()) <= 64
    assert len(axes.get_xticklabels()) <= 16


def test_colours_are_centred_and_may_be_fixed() -> None:
    def limits(*maps: TokenMap, limit: float | None = None) -> list[tuple[float, float]]:
        figure = heatmap_figure(*maps, limit=limit)
        png(figure)
        return [axes.get_images()[0].get_clim() for axes in figure.axes if axes.get_images()]

    assert limits(token_map(), limit=0.3) == [(-0.3, 0.3)]
    assert limits(token_map(), token_map(2 * VALUES)) == [(-0.4, 0.4)] * 2
    assert limits(token_map(np.zeros((2, 2)))) == [(-0.01, 0.01)]  # 1 % of a probability that is not known
    assert limits(token_map(np.full((2, 2), np.nan))) == [(-0.01, 0.01)]
    assert limits(token_map(0.001 * VALUES, p_base=0.5)) == [(-0.005, 0.005)]  # so that noise is not drawn in full


def test_several_maps_are_panels() -> None:
    figure = heatmap_figure(*[token_map(title=f"map {index}") for index in range(4)])
    png(figure)
    assert [axes.get_title() for axes in figure.axes if axes.get_images()] == [f"map {index}" for index in range(4)]
    assert figure.axes[0].get_gridspec().nrows == 2


def test_a_map_in_axes_of_ones_own() -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert heatmap_figure(token_map(), ax=right) is figure
    assert (len(left.get_images()), len(right.get_images()), len(figure.axes)) == (0, 1, 2)
    with pytest.raises(ValueError, match="one axes holds one token map, got 2"):
        heatmap_figure(token_map(), token_map(), ax=left)


def test_from_the_rows_of_a_sweep() -> None:
    rows = positions(np.vstack([VALUES, np.full((2, 3), np.nan)]))  # two positions more than this prompt has
    one = TokenMap.of(rows.sample(frac=1, random_state=0), ["a", "b"], subject=(1,), answer="Rome")
    np.testing.assert_allclose(one.values, VALUES)
    assert (list(one.layers), one.p_base, one.subject) == ([0, 1, 2], 0.5, (1,))
    assert one.title == "m: token → last"
    assert one.caption == "answer: Rome, p = 0.5"
    assert one.layer_label == "Layer (first of the window, 3 layers)"
    padded = TokenMap.of(rows, ["a", "b", "c", "d", "e"])
    assert np.isnan(padded.values[2:]).all()


def joined(column: str, values: Sequence[Any]) -> pd.DataFrame:
    return pd.concat([positions(VALUES).assign(**{column: value}) for value in values])


def test_rows_that_are_no_single_map_are_refused() -> None:
    for column in ("model", "prompt_id", "target", "feature_group"):
        with pytest.raises(ValueError, match=f"shows one {column}, but these rows have 2: 'x', 'y'; choose one"):
            TokenMap.of(joined(column, ["x", "y"]), ["a", "b"])
    with pytest.raises(ValueError, match="several at one layer; choose one"):
        TokenMap.of(joined("p", [0.1, 0.2]), ["a", "b"])
    with pytest.raises(ValueError, match="got 'subject'; `flow_figure` draws roles"):
        TokenMap.of(positions(VALUES).replace({"source": "0"}, "subject"), ["a", "b"])
    with pytest.raises(ValueError, match="knock out position 1, but there are only 1 tokens"):
        TokenMap.of(positions(VALUES), ["a"])
    with pytest.raises(ValueError, match=r"these are missing: \['n_edges', 'p'\]"):
        TokenMap.of(positions(VALUES).drop(columns=["n_edges", "p"]), ["a", "b"])
    with pytest.raises(ValueError, match="at least one row"):
        TokenMap.of(positions(VALUES).head(0), ["a", "b"])


def test_maps_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(ValueError, match=r"are \[2, 3\] \[token, window\], but there are 1 tokens; give 2"):
        TokenMap(VALUES, ["a"], [0, 1, 2])
    with pytest.raises(ValueError, match="but there are 2 layers; give 3"):
        TokenMap(VALUES, ["a", "b"], [0, 1])
    with pytest.raises(ValueError, match="the subject has row 2"):
        token_map(subject=[2])
    with pytest.raises(ValueError, match=r"at least one of each, got \[0, 3\]"):
        token_map(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="some are infinite"):
        token_map(np.full((1, 1), np.inf))
    with pytest.raises(ValueError, match="no token maps"):
        heatmap_figure()
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be positive, such as 0.3"):
            heatmap_figure(token_map(), limit=limit)
