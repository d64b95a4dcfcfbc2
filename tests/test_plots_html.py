"""Interactive pages: the numbers in them, and that they need nothing from outside."""

from typing import Any

import numpy as np
import pytest
from drawn import check_offline, on_page, summary

from ssm_interp.plots import STATISTICS, TokenMap, flow_page, heatmap_page


def curves(traces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [trace for trace in traces if trace["mode"] == "lines+markers"]


@pytest.mark.parametrize("statistic", list(STATISTICS))
def test_flow_lines_with_the_numbers(statistic: Any) -> None:
    frame, column = summary(["one", "two"], ["subject", "last"], layers=5, sizes=[2]), STATISTICS[statistic]
    page = flow_page(frame, statistic=statistic, x_labels={"one": "First <layer>"})
    check_offline(page)
    traces, layout, _ = on_page(page)
    scale = 100 if statistic == "accuracy" else 1
    keys = [(model, source) for model in ("one", "two") for source in ("subject", "last")]
    for curve, band, (model, source) in zip(curves(traces), traces[::2], keys, strict=True):
        rows = frame[(frame["model"] == model) & (frame["source"] == source)]
        assert curve["name"] == curve["legendgroup"] == band["legendgroup"] == source
        assert curve["x"] == rows["layer"].tolist()
        np.testing.assert_allclose(curve["y"], scale * rows[column.value])
        bounds = [*(scale * rows[column.high]), *(scale * rows[column.low])[::-1]]
        np.testing.assert_allclose(band["y"], bounds)
        first = rows.iloc[0]
        low, high = (f"{scale * first[name]:.4g}" for name in (column.low, column.high))
        assert curve["text"][0].split("<br>") == [
            model,
            f"{source} → last",
            "2 layers from layer 0",
            f"{scale * first[column.value]:.4g} ({column.line}), 95 % interval {low} to {high}",
            "12 prompts",
        ]
    assert [curve["showlegend"] for curve in curves(traces)] == [True, True, False, False]  # one switch for all panels
    assert layout["xaxis"]["title"]["text"] == "First &lt;layer&gt;"
    assert layout["yaxis"]["title"]["text"] == column.label.replace("the metric", "kl")
    titles = [note["text"] for note in layout["annotations"]]
    assert titles == ["one, 12 prompts<br>source → last", "two, 12 prompts<br>source → last"]


def test_panels_as_in_the_figure() -> None:
    page = flow_page(summary(["one"], ["last"], sizes=range(1, 6), layers=5), title="A <study>")
    check_offline(page)
    traces, layout, _ = on_page(page)
    assert len({curve["xaxis"] for curve in curves(traces)}) == 5
    assert layout["annotations"][4]["text"] == "windows of 5 layers<br>source → last"
    assert [layout[f"xaxis{n}"].get("matches") for n in ("", 2, 5)] == [None, "x", "x"]
    assert "<title>A &lt;study&gt;: one, 12 prompts</title>" in page
    grouped, _, _ = on_page(flow_page(summary(["one"], ["last"], groups=("fast", "slow"))))
    assert "features: slow" in curves(grouped)[1]["text"][0]


def test_one_prompt_has_no_band_and_names_cannot_break_out() -> None:
    name = "</script><b>&x"
    frame = summary([name], ["last"]).assign(n=1, low=np.nan, high=np.nan)
    page = flow_page(frame)
    check_offline(page)
    assert name not in page
    traces, layout, _ = on_page(page)
    assert traces[0]["y"] == []
    assert layout["annotations"][0]["text"].startswith("&lt;/script&gt;&lt;b&gt;&amp;x, 1 prompt")
    text = curves(traces)[0]["text"][0]
    assert text.startswith("&lt;/script&gt;&lt;b&gt;&amp;x<br>last → last")
    assert "interval" not in text


def test_a_page_is_the_same_each_time() -> None:
    frame = summary(["one"], ["subject", "last"])
    assert flow_page(frame) == flow_page(frame)


def test_heat_maps_with_the_numbers() -> None:
    values = np.array([[-0.25, 0.125], [np.nan, 0.0]])
    one = TokenMap(values, [" <b>", "x"], [3, 4], subject=[1], title="one", answer="Rome", p_base=0.5)
    page = heatmap_page(one, TokenMap(values, ["a", "b"], [0, 1]))
    check_offline(page)
    traces, layout, _ = on_page(page)
    assert [trace["type"] for trace in traces] == ["heatmap", "heatmap"]
    assert traces[0]["z"] == [[-0.25, 0.125], [None, 0.0]]
    assert traces[0]["x"] == ["3", "4"]
    assert traces[0]["text"][0][0] == "token 0 ·&lt;b&gt;<br>window at layer 3<br>-0.25: 0.5 to 0.25"
    assert layout["yaxis"]["ticktext"] == ["·&lt;b&gt;", "<b>x</b>"]
    assert (layout["coloraxis"]["cmin"], layout["coloraxis"]["cmax"]) == (-0.25, 0.25)
    assert layout["annotations"][0]["text"] == "one<br>answer: Rome, p = 0.5"
    fixed = on_page(heatmap_page(one, limit=0.3))[1]
    assert (fixed["coloraxis"]["cmin"], fixed["coloraxis"]["cmax"]) == (-0.3, 0.3)


def test_pages_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(ValueError, match="the summary is empty"):
        flow_page(summary(["one"], ["last"]).head(0))
    with pytest.raises(ValueError, match="no token maps"):
        heatmap_page()
