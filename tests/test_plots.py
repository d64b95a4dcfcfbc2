"""Attention heat maps, and what all figures share."""

import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from drawn import png, summary
from matplotlib.figure import Figure

from ssm_interp.plots import (
    STYLES,
    TokenMap,
    attention_figure,
    attribution_figure,
    circuit_figure,
    depth_figure,
    edge_figure,
    features_figure,
    flow_figure,
    heatmap_figure,
    spectrum_figure,
    stream_figure,
    token_label,
)
from ssm_interp.plots.style import CHANGED, SIZES, WRITTEN
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
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Source token", "Target token")
    signs = "\n(blue: positive, red: negative)" if (matrix < 0).any() else ""
    assert bar.get_ylabel() == f"Attention{signs}"


def test_signed_attention_is_centred_on_zero_and_unsigned_starts_there() -> None:
    tokens = ["a", "b"]
    signed = attention_figure(torch.tensor([[0.5, 0.0], [-2.0, 1.0]]), tokens).axes[0].get_images()[0]
    assert signed.get_clim() == (-2.0, 2.0)
    unsigned = attention_figure(torch.tensor([[0.5, 0.0], [2.0, 1.0]]), tokens).axes[0].get_images()[0]
    assert unsigned.get_clim() == (0.0, 2.0)
    assert (signed.get_cmap().name, unsigned.get_cmap().name) == (WRITTEN, SIZES)  # blue is positive in both
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


def test_blue_speaks_for_the_answer_in_every_map() -> None:
    loss, tokens = torch.tensor([[[-1.0]]]), ["a"]
    removed = edge_figure(loss, tokens, [3]).axes[:2] + heatmap_figure(TokenMap(-np.eye(1), tokens, [3])).axes[:1]
    written = attribution_figure(-loss[0], tokens, [3]).axes[:1]
    for axes in (*removed, *written):
        (image,) = axes.get_images()
        values = image.get_array()
        assert values is not None
        red, _, blue, _ = image.to_rgba(values)[0, 0]
        assert blue > red
        assert image.get_cmap().name == (WRITTEN if axes in written else CHANGED)


def test_a_map_of_rounding_is_drawn_as_nothing_and_says_so() -> None:
    values, tokens = 3e-9 * torch.ones(1, 2, 2).tril(), ["a", "b"]
    figures = {
        "the metric": edge_figure(values, tokens, [0], scale=-4.0),
        "the logit difference": attribution_figure(values[0], tokens, [0, 1], scale=4.0),
        "the answer's probability": heatmap_figure(TokenMap(values[0].double().numpy(), tokens, [0, 1], p_base=0.5)),
    }
    for what, figure in figures.items():
        png(figure)
        for axes in (axes for axes in figure.axes if axes.get_images()):
            (note,) = axes.texts
            assert note.get_text() == f"nothing above 1e-06 of {what}\n(largest entry: 3e-09)"
            (image,) = axes.get_images()
            assert image.to_rgba(3e-9)[:3] == pytest.approx((1, 1, 1), abs=0.04)
    for figure in (edge_figure(values, tokens, [0]), edge_figure(values, tokens, [0], scale=1e-3)):
        assert not figure.axes[0].texts  # nothing is known of its size, or it is large enough
    zeros = attention_figure(torch.zeros(2, 2), tokens)
    assert [text.get_text() for text in zeros.axes[0].texts] == ["all entries are 0"]


def test_sizes_have_no_sign_and_say_nothing_of_support() -> None:
    figure = attribution_figure(torch.tensor([[1.0, 2.0]]), ["a", "b"], [0], signed=False, label="Length")
    (image,) = figure.axes[0].get_images()
    assert (image.get_clim(), image.get_cmap().name, figure.axes[1].get_ylabel()) == ((0.0, 2.0), SIZES, "Length")
    with pytest.raises(ValueError, match="sizes are not negative"):
        attribution_figure(torch.tensor([[-1.0]]), ["a"], [0], signed=False)


def edges(layers: int, length: int) -> torch.Tensor:
    return torch.randn(layers, length, length, generator=torch.Generator().manual_seed(0)).tril()


@pytest.mark.parametrize(("layers", "length", "target"), [(1, 1, -1), (3, 5, -1), (3, 5, 2), (64, 70, 69)])
def test_edges_into_a_token_and_of_each_edge_its_strongest_layer(layers: int, length: int, target: int) -> None:
    values = edges(layers, length)
    figure = edge_figure(values, [f"t{i}" for i in range(length)], range(layers), target=target, title="a model")
    png(figure)
    left, right, bar = figure.axes
    place = target % length
    shown = [axes.get_images()[0].get_array() for axes in (left, right)]
    np.testing.assert_allclose(np.ma.filled(shown[0]), values[:, place, : place + 1].T, rtol=1e-6)
    drawn = torch.tensor(np.ma.filled(shown[1], 0))
    np.testing.assert_allclose(drawn.abs(), values.abs().amax(0), rtol=1e-6)
    assert (drawn[None].float() == values).any(0).all()  # each is one layer's, with its sign
    assert left.get_images()[0].get_clim() == right.get_images()[0].get_clim()
    assert bar.get_ylabel().replace("\n", " ") == (
        "Predicted change of the metric if the edge is removed (blue: the edge supports the metric, red: it opposes it)"
    )
    assert (left.get_xlabel(), left.get_ylabel()) == ("Layer", "Source token")
    assert left.get_title() == f"Edges into “t{place}”, position {place}"
    assert right.get_title().replace("\n", " ") == (
        "All edges, each in its strongest layer" if layers > 1 else "All edges of layer 0"
    )
    assert figure.get_suptitle() == "a model"


NASTY = ["$\\frac$", "_private", "日本", "a\nb", "x" * 60]


def nasty_figures() -> list[Figure]:
    rows = summary(NASTY[:3], NASTY[:2], groups=NASTY[:3])
    circuit = {"layer": 0, "source": NASTY[:4], "target": NASTY[1:], "feature_group": NASTY[:4]}
    statistics = {"layer": [0, 1] * 2, "feature": 0, "statistic": ["half-life"] * 2 + ["$日"] * 2, "value": 1.0}
    titled = {"title": "$T_ 日" * 40, "label": "$l_ 日" * 9}
    return [
        attention_figure(torch.eye(5), NASTY, **titled),
        attribution_figure(torch.ones(1, 5), NASTY, [0], **titled),
        edge_figure(edges(2, 5), NASTY, [0, 1], **titled),
        heatmap_figure(TokenMap(np.eye(5), NASTY, range(5), title=titled["title"], answer="$日")),
        flow_figure(rows),
        features_figure(rows),
        depth_figure(rows),
        stream_figure(pd.concat([rows.assign(through=name) for name in NASTY[:3]])),
        circuit_figure(pd.DataFrame(circuit).assign(kept=True, effect=-1.0), metric="$m_ 日"),
        spectrum_figure(pd.concat([pd.DataFrame(statistics).assign(model=name) for name in NASTY[:3]]), title="$日"),
    ]


def test_names_of_any_characters_are_drawn_as_they_are() -> None:
    for figure in nasty_figures():  # a formula would not parse, and a missing glyph would warn
        png(figure)
    figure = flow_figure(summary(["m"], ["$x$", "_own", "last"]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["$x$", " own", "last"]


def test_a_title_is_broken_where_the_picture_ends() -> None:
    axes = attention_figure(torch.eye(2), ["a", "b"], title="some/long/path " * 8).axes[0]
    figure = axes.figure.figure
    png(figure)
    box = axes.title.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert "\n" in axes.get_title()


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
