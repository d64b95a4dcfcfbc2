"""The report on what flows through the convolution past a knockout of the SSM's edges."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from drawn import png
from scipy import stats
from tiny_flow import world

import ssm_interp as si
from ssm_interp.flow import LeakReport, leak, sweep
from ssm_interp.flow.leak import THROUGH
from ssm_interp.plots import stream_figure


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_the_report_is_three_sweeps_and_what_they_leave(family: str) -> None:
    given = world(family)
    with si.attach(given.model) as ssm:
        report = leak(ssm, given.tokenizer, given.prompts, sources=["subject", "last"], windows=2)
        known = {
            name: sweep(
                ssm, given.tokenizer, given.prompts, sources=["subject", "last"], windows=2, through=through,
                by="forwards",
            ).frame
            for name, through in THROUGH.items()
        }  # fmt: skip
    for name, frame in known.items():
        found = report.frame[report.frame["through"] == name]
        np.testing.assert_allclose(found["p"], frame["p"], rtol=1e-5)
    wide = report.by_prompt()
    assert len(wide) == len(known["ssm"])
    first = wide.iloc[0]
    one = {
        name: frame[(frame["prompt_id"] == first["prompt_id"]) & (frame["source"] == first["source"])
                    & (frame["layer"] == first["layer"])].iloc[0]
        for name, frame in known.items()
    }  # fmt: skip
    expected = 100 * (one["ssm"]["p"] - one["ssm + conv"]["p"]) / one["ssm"]["p_base"]
    assert first["leak"] == pytest.approx(expected, rel=1e-4)
    assert wide["leak"].abs().max() > 1  # there is a leak to see

    summary = report.summary(level=0.9)
    rows = wide[(wide["source"] == "last") & (wide["layer"] == 1)]
    row = summary[(summary["source"] == "last") & (summary["layer"] == 1)].iloc[0]
    assert row["leak"] == pytest.approx(rows["leak"].mean())
    assert row["leak"] == pytest.approx(row["ssm"] - row["ssm + conv"])
    bootstrap = stats.bootstrap((rows["leak"],), np.mean, confidence_level=0.9, method="percentile", rng=0)
    low, high = bootstrap.confidence_interval
    assert low < row["leak"] < high
    np.testing.assert_allclose([row["low"], row["high"]], [low, high], atol=0.05 * (high - low))
    assert row["n"] == len(rows)


def test_the_picture_has_a_line_per_stream() -> None:
    given = world("mamba2")
    with si.attach(given.model) as ssm:
        report = leak(ssm, given.tokenizer, given.prompts, sources=["subject", "last"], targets=["last"], windows=1)
    figure = report.plot()
    png(figure)
    assert [axes.get_title() for axes in figure.axes] == ["source: subject", "source: last"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(THROUGH)
    assert figure.get_suptitle() == f"Mamba2ForCausalLM   ({len(given.prompts)} prompts)"
    assert figure.axes[0].get_xlabel() == "Layer"
    lines = {str(line.get_label()): line for line in figure.axes[0].get_lines()}
    summary = report.summary()
    for name in THROUGH:
        np.testing.assert_allclose(lines[name].get_ydata(), summary.loc[summary["source"] == "subject", name])


def test_what_it_cannot_compare_is_refused() -> None:
    given = world("mamba2")
    with si.attach(given.model) as ssm:
        with pytest.raises(TypeError, match="leak takes no features: it compares"):
            leak(ssm, given.tokenizer, given.prompts, features=["top third"])
        with pytest.raises(si.InterventionError, match="takes no features"):
            sweep(ssm, given.tokenizer, given.prompts, features=["top third"], through=("ssm", "conv"))
    with pytest.raises(ValueError, match="needs a column `through`"):
        stream_figure(pd.DataFrame({"source": ["subject"]}))


def test_the_last_digits_of_the_clean_run_split_no_prompt() -> None:
    given = world("mamba2")
    with si.attach(given.model) as ssm:
        report = leak(ssm, given.tokenizer, given.prompts, sources=["last"], windows=2)
    frame = report.frame.copy()
    frame.loc[frame["through"] == "conv", "p_base"] *= 1 + 1e-7
    moved = LeakReport(frame)
    assert set(moved.summary()["n"]) == {len(given.prompts)}
    assert not moved.by_prompt().isna().any(axis=None)


def test_a_metric_leaks_too() -> None:
    scene = world("mamba2", count=3)
    options = {"sources": ["last"], "windows": 2, "answered_only": False, "metric": "logit_difference"}
    with si.attach(scene.model) as ssm:
        report = leak(ssm, scene.tokenizer, scene.prompts, **options)
    place = ["prompt_id", "source", "target", "layer"]
    values = report.frame.set_index([*place, "through"])["value"].unstack("through")
    found = report.by_prompt().set_index(place)["value_leak"]
    np.testing.assert_allclose(found, (values["ssm"] - values["ssm + conv"]).loc[found.index], rtol=1e-12)
    assert found.abs().max() > 1e-3
    np.testing.assert_allclose(
        report.summary().set_index("layer")["value_leak"], found.groupby("layer").mean(), rtol=1e-12
    )
