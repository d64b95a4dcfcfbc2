"""Attention heat maps, and what all figures share."""

import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from drawn import png, summary
from matplotlib.figure import Figure

from ssm_interp.plots import STYLES, attention_figure, flow_figure, token_label
from ssm_interp.prompts import ROLES


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


def test_attention_in_axes_of_ones_own() -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert attention_figure(torch.eye(3), ["a", "b", "c"], ax=right) is figure
    assert (len(left.get_images()), len(right.get_images())) == (0, 1)
    png(figure)


def test_every_role_has_a_look_of_its_own() -> None:
    for part in range(3):  # colours, markers, dashes; two of the dashes are solid
        assert len({STYLES[role][part] for role in ROLES}) == len(ROLES) - (part == 2)


def test_an_svg_keeps_its_text_and_is_the_same_each_time(tmp_path: Path) -> None:
    before = matplotlib.rcParams["svg.fonttype"]
    for name in ("one.svg", "two.svg"):
        flow_figure(summary(["a model"], ["subject", "last"])).savefig(tmp_path / name)
    one = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert one == (tmp_path / "two.svg").read_text(encoding="utf-8")
    assert ">subject</text>" in one
    assert "<dc:date>" not in one
    assert matplotlib.rcParams["svg.fonttype"] == before
    buffer = io.BytesIO()
    flow_figure(summary(["a model"], ["last"])).savefig(buffer, format="svg", metadata={"Title": "Flow"})
    assert b"<dc:title>Flow" in buffer.getvalue()


@pytest.mark.parametrize("ending", ["png", "pdf"])
def test_other_files_are_written_too(tmp_path: Path, ending: str) -> None:
    flow_figure(summary(["one"], ["last"])).savefig(str(tmp_path / f"flow.{ending}"))
    assert (tmp_path / f"flow.{ending}").stat().st_size > 1000
