"""Pages of attention, edges and circuits: the numbers in them, their controls, and what is refused."""

from __future__ import annotations

from base64 import b64decode
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from drawn import check_offline, on_page

from ssm_interp.plots import attention_page, circuit_page, edges_page
from ssm_interp.plots.style import OPPOSES, SUPPORTS

TOKENS = [" <b>", "x", "x"]
LAYERS = (3, 5)


def numbers(trace: dict[str, Any]) -> np.ndarray:
    """What a heat map of a page shows; NaN where it is blank."""
    packed = trace["z"]
    shape = [int(size) for size in packed["shape"].split(",")]
    return np.frombuffer(b64decode(packed["bdata"]), packed["dtype"]).reshape(shape)


def edge_values() -> torch.Tensor:
    return torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).tril()


def edge_frame(values: torch.Tensor) -> pd.DataFrame:
    places = [(layer, t, s) for layer in range(2) for t in range(3) for s in range(t + 1)]
    rows = [(LAYERS[layer], t, s, float(values[layer, t, s])) for layer, t, s in places]
    return pd.DataFrame(rows, columns=["layer", "target", "source", "attribution"])


@pytest.mark.parametrize("signed", [True, False])
def test_attention_with_its_numbers_and_a_label_per_position(signed: bool) -> None:
    matrix = edge_values()[0] if signed else edge_values()[0].abs()
    page = attention_page(matrix, TOKENS, "a <model>, layer 3", label="Mean attention")
    check_offline(page)
    (trace,), layout, _ = on_page(page)
    np.testing.assert_allclose(np.nan_to_num(numbers(trace)), matrix, rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(numbers(trace)), np.triu(np.ones((3, 3), dtype=bool), 1))
    assert trace["x"] == trace["y"] == ["0 ·&lt;b&gt;", "1 x", "2 x"]
    end = float(matrix.abs().max())
    assert (layout["coloraxis"]["cmin"], layout["coloraxis"]["cmax"]) == pytest.approx((-end if signed else 0, end))
    words = layout["coloraxis"]["colorbar"]["title"]["text"]
    assert words == ("Mean attention<br>(blue: positive, red: negative)" if signed else "Mean attention")
    assert "<title>a &lt;model&gt;, layer 3</title>" in page
    assert page == attention_page(matrix, TOKENS, "a <model>, layer 3", label="Mean attention")


def test_edges_by_target_and_by_layer() -> None:
    values = edge_values()
    page = edges_page(edge_frame(values).sample(frac=1, random_state=0), TOKENS, "a model", target=1)
    check_offline(page)
    traces, layout, _ = on_page(page)
    assert [trace.get("visible", True) for trace in traces] == [False, True, False, True, False, False]
    for target, trace in enumerate(traces[:3]):  # source x layer into each target
        np.testing.assert_allclose(np.nan_to_num(numbers(trace)), values[:, target].T, rtol=1e-6)
    strongest = np.nan_to_num(numbers(traces[3]))
    np.testing.assert_allclose(np.abs(strongest), values.abs().amax(0), rtol=1e-6)
    for trace, layer, one in zip(traces[4:], LAYERS, values, strict=True):
        np.testing.assert_allclose(np.nan_to_num(numbers(trace)), one, rtol=1e-6)
        assert trace["meta"] == str(layer)
    told = np.array(traces[3]["text"])[np.tril_indices(3)]
    np.testing.assert_array_equal(
        told, np.array(LAYERS)[values.abs().argmax(0).numpy()].astype(str)[np.tril_indices(3)]
    )
    (menu,), (slider,) = layout["updatemenus"], layout["sliders"]
    assert [button["label"] for button in menu["buttons"]] == ["into 0 ·&lt;b&gt;", "into 1 x", "into 2 x"]
    assert menu["buttons"][2]["args"] == [{"visible": [False, False, True]}, [0, 1, 2]]
    assert [step["label"] for step in slider["steps"]] == ["strongest", "3", "5"]
    assert slider["steps"][1]["args"] == [{"visible": [False, True, False]}, [3, 4, 5]]
    assert layout["coloraxis"]["cmax"] == pytest.approx(float(values.abs().max()))
    assert "<title>a model (nothing above 1e-06 of the metric" in edges_page(
        edge_frame(values), TOKENS, "a model", scale=1e8
    )


def circuit(groups: tuple[str, ...] = ("all",)) -> pd.DataFrame:
    rows = [
        (layer, "subject", "last", group, layer != 2, -4.0 if layer else 1.0) for layer in range(3) for group in groups
    ]
    return pd.DataFrame(rows, columns=["layer", "source", "target", "feature_group", "kept", "effect"])


def test_circuits_have_an_arrow_per_kept_edge_which_tells_its_effect() -> None:
    page = circuit_page(circuit(), roles=["subject", "after", "last"], title="one\ntwo", metric="ln p <nats>")
    check_offline(page)
    arrows, layout, _ = on_page(page)
    assert [arrow["line"]["color"] for arrow in arrows] == [OPPOSES, SUPPORTS]
    assert [arrow["line"]["width"] for arrow in arrows] == [3, 6]
    assert [(arrow["x"][0], arrow["x"][-1]) for arrow in arrows] == [(0, 2), (0, 2)]
    assert arrows[1]["text"] == "layer 1<br>subject → last<br>-4: change of ln p &lt;nats&gt; if removed"
    assert layout["xaxis"]["ticktext"] == ["subject", "after", "last"]
    assert layout["yaxis"]["ticktext"] == ["0", "1", "2"]
    assert "blue: they support it, red: they oppose it" in layout["title"]["text"]
    assert "<title>one, two</title>" in page
    traces, _, _ = on_page(circuit_page(circuit(("top <third>", "the rest"))))
    assert [trace["name"] for trace in traces if trace["showlegend"]] == ["top &lt;third&gt;", "the rest"]
    assert "features: top &lt;third&gt;" in traces[0]["text"]


def test_pages_that_cannot_be_drawn_are_refused() -> None:
    frame = edge_frame(edge_values())
    with pytest.raises(ValueError, match=r"square matrix \[t, s\], got \[2, 3\]"):
        attention_page(torch.zeros(2, 3), ["a", "b"])
    with pytest.raises(ValueError, match=r"these are missing: \['attribution'\]"):
        edges_page(frame.drop(columns="attribution"), TOKENS)
    with pytest.raises(ValueError, match="the table has no rows"):
        edges_page(frame.head(0), TOKENS)
    for column in ("row", "feature_group"):
        with pytest.raises(ValueError, match=f"shows one {column}, but this table has several; choose one"):
            edges_page(pd.concat([frame.assign(**{column: 0}), frame.assign(**{column: 1})]), TOKENS)
    with pytest.raises(ValueError, match="an edge of position 2, but there are 2 tokens"):
        edges_page(frame, TOKENS[:2])
    with pytest.raises(ValueError, match="must be finite"):
        edges_page(frame.assign(attribution=np.inf), TOKENS)
    with pytest.raises(ValueError, match="the target is position 3"):
        edges_page(frame, TOKENS, target=3)
    with pytest.raises(ValueError, match="the frame has no rows"):
        circuit_page(circuit().head(0))
