"""Figures: that they show the numbers, and survive awkward ones."""

import io
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ssm_interp.plots import STYLES, attention_figure, flow_figure, token_label
from ssm_interp.prompts import ROLES


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    return buffer.getvalue()


def summary(models: list[str], sources: list[str], targets: list[str], layers: int = 4) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    keys = [(m, s, t, layer) for m in models for t in targets for s in sources for layer in range(layers)]
    frame = pd.DataFrame(keys, columns=["model", "source", "target", "layer"])
    frame["mean"] = rng.normal(-20, 10, len(frame))
    return frame.assign(n=12, low=frame["mean"] - 3, high=frame["mean"] + 4)


def test_a_panel_per_model_and_a_line_per_source_with_the_numbers() -> None:
    frame = summary(["one", "two"], ["subject", "last"], ["last"])
    figure = flow_figure(frame, x_labels={"one": "First layer", "two": "Centre layer"})
    png(figure)
    assert [axes.get_title() for axes in figure.axes] == ["one   (12 prompts)", "two   (12 prompts)"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["First layer", "Centre layer"]
    assert "answer's probability (%)" in figure.axes[0].get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["subject", "last"]
    for axes, model in zip(figure.axes, ["one", "two"], strict=True):
        lines = {line.get_label(): line for line in axes.get_lines() if line.get_label() in ROLES}
        bands = {to_hex(band.get_facecolor()[0]): band for band in axes.collections}
        assert any(np.all(np.asarray(line.get_ydata()) == 0) for line in axes.get_lines())  # the zero line
        for source in ("subject", "last"):
            rows = frame[(frame["model"] == model) & (frame["source"] == source)]
            np.testing.assert_allclose(lines[source].get_xdata(), rows["layer"])
            np.testing.assert_allclose(lines[source].get_ydata(), rows["mean"])
            corners = bands[STYLES[source][0].lower()].get_paths()[0].get_extents()
            np.testing.assert_allclose([corners.y0, corners.y1], [rows["low"].min(), rows["high"].max()])


def test_a_row_per_target_and_every_role_told_apart() -> None:
    figure = flow_figure(summary(["one"], list(ROLES), ["last", "subject_last"]))
    png(figure)
    assert len(figure.axes) == 2
    assert "subject last" in figure.axes[1].get_ylabel()
    for part in (0, 1):  # colours, markers
        assert len({STYLES[role][part] for role in ROLES}) == len(ROLES)


def test_lines_are_drawn_in_the_order_of_the_layers() -> None:
    frame = summary(["one"], ["last"], ["last"]).sample(frac=1, random_state=1)
    (line,) = [line for line in flow_figure(frame).axes[0].get_lines() if line.get_label() == "last"]
    assert list(line.get_xdata()) == [0, 1, 2, 3]


@pytest.mark.parametrize("layers", [1, 2, 64])
def test_one_window_one_prompt_and_an_odd_name(layers: int) -> None:
    frame = summary(["a$b_c/" * 9], ["unheard_of"], ["last"], layers=layers).assign(n=1, low=np.nan, high=np.nan)
    title = flow_figure(frame).axes[0].get_title()
    png(flow_figure(frame))
    assert title.startswith("…")
    assert title.endswith("(1 prompt)")


def test_a_summary_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"these are missing: \['low', 'high'\]"):
        flow_figure(summary(["one"], ["last"], ["last"]).drop(columns=["low", "high"]))
    with pytest.raises(ValueError, match="the summary is empty"):
        flow_figure(summary(["one"], ["last"], ["last"]).head(0))


@pytest.mark.parametrize("length", [1, 2, 5, 63, 257])
def test_attention_of_any_length(length: int) -> None:
    matrix = torch.randn(length, length).tril()
    figure = attention_figure(matrix, [f" t{i}" for i in range(length)], title="layer $3")
    png(figure)
    axes, bar = figure.axes
    shown = axes.get_images()[0].get_array()
    assert shown is not None
    np.testing.assert_array_equal(np.ma.getmaskarray(shown), np.triu(np.ones((length, length), dtype=bool), 1))
    np.testing.assert_allclose(np.ma.filled(shown, 0), matrix, rtol=1e-7)
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == [text.get_text() for text in axes.get_xticklabels()]
    assert len(labels) <= 64
    assert labels[0] == "·t0"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("source (written at)", "target (read at)")
    assert bar.get_ylabel() == "Attention"


def test_signed_attention_is_centred_on_zero_and_unsigned_starts_there() -> None:
    tokens = ["a", "b"]
    signed = attention_figure(torch.tensor([[0.5, 0.0], [-2.0, 1.0]]), tokens).axes[0].get_images()[0]
    assert signed.get_clim() == (-2.0, 2.0)
    unsigned = attention_figure(torch.tensor([[0.5, 0.0], [2.0, 1.0]]), tokens).axes[0].get_images()[0]
    assert unsigned.get_clim() == (0.0, 2.0)
    assert signed.get_cmap().name != unsigned.get_cmap().name
    assert attention_figure(torch.zeros(2, 2), tokens).axes[0].get_images()[0].get_clim() == (0.0, 1.0)


def test_tokens_the_font_cannot_show_are_escaped() -> None:
    tokens = [" is", "\n", "日", "$x$", "\u202e", "a" * 40]
    labels = [token_label(token) for token in tokens]
    assert labels == ["·is", r"\n", r"\u65e5", "$x$", r"\u202e", "a" * 17 + "…"]
    png(attention_figure(torch.eye(6), tokens))  # a missing glyph would warn, and warnings are errors


def test_attention_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"square matrix \[t, s\], got \[2, 3\]"):
        attention_figure(torch.zeros(2, 3), ["a", "b"])
    with pytest.raises(ValueError, match=r"is \[2, 2\], but there are 3 tokens"):
        attention_figure(torch.zeros(2, 2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="square matrix"):
        attention_figure(torch.zeros(0, 0), [])
    with pytest.raises(ValueError, match="not finite"):
        attention_figure(torch.tensor([[torch.nan]]), ["a"])


def test_pyplot_stays_out_of_it() -> None:
    png(attention_figure(torch.eye(2), ["a", "b"]))
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
