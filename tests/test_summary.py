"""Summaries over prompts, against numpy and scipy by hand."""

import inspect
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ssm_interp.flow import FlowError, summarise

Changes = dict[tuple[str, int], list[float]]


def frame(changes: Changes, empty: int = 0, **columns: Any) -> pd.DataFrame:
    rows = [
        {
            "prompt_id": f"p{number}",
            "model": "m",
            "source": source,
            "target": "last",
            "feature_group": "all",
            "layer": layer,
            "window_start": layer,
            "window_size": 2,
            "unasked": number % 3,
            "n_edges": 0 if number < empty else 3,
            "p_base": 0.5,
            "p": 0.5 * (1 + change / 100),
            "relative_change": change,
            "logprob_difference": np.log1p(max(change, -99) / 100),
            "hit": change > -50,
        }
        for (source, layer), values in changes.items()
        for number, change in enumerate(values)
    ]
    return pd.DataFrame(rows).assign(**columns)


def sample(n: int = 57, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).uniform(-80, 20, size=n).tolist()


def test_summary_against_scipy() -> None:
    values = np.array(sample())
    logs = np.log1p(values / 100)
    row = summarise(frame({("subject", 3): values.tolist()}, empty=4), interval="t").iloc[0]
    assert (row["n"], row["n_empty"], row["n_first"]) == (57, 4, 38)
    assert (row["window_start"], row["window_size"], row["level"]) == (3, 2, 0.95)
    for column, numbers in (("relative_change", values), ("logprob_difference", logs)):
        names = ["mean", "low", "high"] if column == "relative_change" else [column, f"{column}_low", f"{column}_high"]
        interval = stats.t.interval(0.95, 56, loc=numbers.mean(), scale=stats.sem(numbers))
        np.testing.assert_allclose(row[names].astype(float), [numbers.mean(), *interval], rtol=1e-12)
    np.testing.assert_allclose(row["median"], np.median(values), rtol=1e-12)
    np.testing.assert_allclose(row["median_logprob_difference"], np.median(logs), rtol=1e-12)
    np.testing.assert_allclose(row["accuracy"], (values > -50).mean(), rtol=1e-12)
    np.testing.assert_allclose([row["p_base"], row["p"]], [0.5, 0.5 * (1 + values.mean() / 100)], rtol=1e-12)


def test_the_change_of_a_metric_against_scipy() -> None:
    base, value = np.array(sample(seed=1)), np.array(sample(seed=2))
    columns = {"metric": "logit_difference", "value_base": base, "value": value}
    changes = {("subject", 3): sample(), ("last", 3): sample()}
    rows = frame(changes)
    both = rows.assign(**{name: np.tile(column, 2) if name != "metric" else column for name, column in columns.items()})
    both.loc[both["source"] == "last", "value"] += 1000  # no bound keeps a metric
    for row, more in zip(summarise(both, interval="t").iloc, (0, 1000), strict=True):
        change = value + more - base
        assert row["metric"] == "logit_difference"
        interval = stats.t.interval(0.95, 56, loc=change.mean(), scale=stats.sem(change))
        given = row[["value_difference", "value_difference_low", "value_difference_high"]].astype(float)
        np.testing.assert_allclose(given, [change.mean(), *interval], rtol=1e-12)
        np.testing.assert_allclose([row["value_base"], row["value"]], [base.mean(), value.mean() + more], rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 57, 200])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_of_median_and_accuracy_against_scipy(n: int, level: float) -> None:
    values = sample(n, seed=n)
    row = summarise(frame({("subject", 0): values}), level=level).iloc[0]
    median = stats.quantile_test(values, p=0.5).confidence_interval(level)
    np.testing.assert_array_equal([row["median_low"], row["median_high"]], [median.low, median.high])
    wilson = stats.binomtest(sum(v > -50 for v in values), n).proportion_ci(level, "wilson")
    found = [row["accuracy_low"], row["accuracy_high"]]
    np.testing.assert_allclose(found, [wilson.low, wilson.high], rtol=1e-9, atol=1e-15)


def test_the_accuracy_of_prompts_that_all_stay_right_has_an_interval_within_0_and_1() -> None:
    row = summarise(frame({("subject", 0): [0.0] * 9, ("last", 0): [-99.0] * 9}))
    assert row["accuracy"].tolist() == row["accuracy_high"].iloc[:1].tolist() + row["accuracy_low"].iloc[1:].tolist()
    assert row["accuracy"].tolist() == [1.0, 0.0]
    assert 0.6 < row["accuracy_low"][0] < 1.0
    assert 0.0 < row["accuracy_high"][1] < 0.4


def test_the_bootstrap_is_that_of_scipy_up_to_its_draws() -> None:
    values = np.random.default_rng(1).exponential(20, size=40) - 60
    rows = frame({("subject", 0): values.tolist()})
    found = summarise(rows, resamples=20_000).iloc[0]
    options = {"n_resamples": 20_000, "method": "percentile", "rng": np.random.default_rng(2)}
    for names, column in (
        (["low", "high"], "relative_change"),
        (["logprob_difference_low", "logprob_difference_high"], "logprob_difference"),
    ):
        low, high = stats.bootstrap((rows[column],), np.mean, **options).confidence_interval
        np.testing.assert_allclose(found[names].astype(float), [low, high], atol=0.03 * (high - low))
    student = summarise(rows, interval="t").iloc[0]
    assert found["high"] - found["mean"] > found["mean"] - found["low"]  # skewed as the sample is; Student's t is not
    assert student["high"] - student["mean"] == pytest.approx(student["mean"] - student["low"])


def test_a_bootstrap_interval_depends_on_its_own_prompts_and_the_seed_alone() -> None:
    both = frame(
        {("subject", 1): sample(9, 1), ("last", 0): sample(5, 2), ("first", 0): sample(9, 3), ("all", 0): [1.0]}
    )
    summary = summarise(both, interval="bootstrap", resamples=300)
    for row, source in enumerate(["subject", "last", "first", "all"]):
        alone = summarise(both[both["source"] == source], interval="bootstrap", resamples=300)
        pd.testing.assert_frame_equal(summary.iloc[[row]].reset_index(drop=True), alone, rtol=1e-12)
    other = summarise(both, interval="bootstrap", resamples=300, seed=1)
    assert summary["low"][0] != other["low"][0]
    assert summary["mean"].equals(other["mean"])
    assert np.isnan(summary.loc[3, ["low", "high"]].to_numpy(float)).all()


@pytest.mark.parametrize("interval", ["t", "bootstrap"])
def test_an_interval_covers_the_mean_as_often_as_it_says(interval: Any) -> None:
    draws = np.random.default_rng(0).normal(-30, 20, size=(400, 30)).clip(-99)
    summary = summarise(frame({("subject", layer): list(row) for layer, row in enumerate(draws)}), interval=interval)
    assert 0.91 < ((summary["low"] < -30) & (summary["high"] > -30)).mean() < 0.98
    assert ((summary["median_low"] < -30) & (summary["median_high"] > -30)).mean() > 0.93
    wider = summarise(frame({("subject", 0): list(draws[0])}), level=0.99, interval=interval).iloc[0]
    assert wider["low"] < summary["low"][0] < summary["high"][0] < wider["high"]


def test_groups_stay_apart_and_in_order() -> None:
    rows = frame({("subject", 1): [-10.0, -20.0], ("last", 0): [5.0, 5.0], ("subject", 0): [0.0, -2.0]})
    summary = summarise(pd.concat([rows, rows.assign(feature_group="slow", relative_change=7.0)]))
    assert summary[["source", "layer", "feature_group", "mean"]].to_numpy().tolist() == [
        ["subject", 1, "all", -15.0],
        ["last", 0, "all", 5.0],
        ["subject", 0, "all", -1.0],
        ["subject", 1, "slow", 7.0],
        ["last", 0, "slow", 7.0],
        ["subject", 0, "slow", 7.0],
    ]
    assert summary.loc[1, "low"] == summary.loc[1, "high"] == 5.0
    shuffled = summarise(pd.concat([rows, rows.assign(feature_group="slow")]).astype({"source": "category"}))
    assert len(shuffled) == 6


def test_prompts_of_a_group_need_not_stand_together() -> None:
    rows = frame({("subject", 0): sample(9, 1), ("last", 0): sample(9, 2)})
    mixed = rows.sort_values("prompt_id", kind="stable")
    for interval in ("t", "bootstrap"):
        pd.testing.assert_frame_equal(summarise(rows, interval=interval), summarise(mixed, interval=interval))


def test_one_prompt_has_no_interval() -> None:
    row = summarise(frame({("subject", 0): [-7.0]})).iloc[0]
    assert row["mean"] == row["median"] == pytest.approx(-7.0)
    for name in ("low", "high", "median_low", "median_high", "logprob_difference_low", "logprob_difference_high"):
        assert np.isnan(row[name])
    assert row["accuracy_low"] < row["accuracy"] == row["accuracy_high"] == 1.0


def test_bad_input_is_refused() -> None:
    rows = frame({("subject", 0): [1.0, 2.0]})
    with pytest.raises(FlowError, match=r"these are missing: \['feature_group', 'hit'\]"):
        summarise(rows.drop(columns=["hit", "feature_group"]))
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(FlowError, match=f"between 0 and 1, such as 0.95, got {level}"):
            summarise(rows, level=level)
    with pytest.raises(FlowError, match="the table is empty"):
        summarise(rows.head(0))
    with pytest.raises(FlowError, match="there is no interval 'bca': give 't' or 'bootstrap'"):
        inspect.unwrap(summarise)(rows, interval="bca")  # past the tests' own check of annotations
    with pytest.raises(FlowError, match="at least one resample, got 0"):
        summarise(rows, interval="bootstrap", resamples=0)


IMPOSSIBLE = [-100.0] * 2 + [-30.0]  # Student's t: -177 % to +24 %


@pytest.mark.parametrize("interval", ["t", "bootstrap"])
def test_no_interval_goes_beyond_what_is_possible(interval: Any) -> None:
    """A change of a probability is at least -100 %, and at most what takes it to 1 (here from 0.5, or from 0.999)."""
    low, high = stats.t.interval(0.95, 2, loc=np.mean(IMPOSSIBLE), scale=stats.sem(IMPOSSIBLE))
    assert low < -170 and high > 20
    few = frame({("subject", 0): IMPOSSIBLE, ("last", 0): [-99.0, 0.1, 0.0]})
    few.loc[few["source"] == "last", "p_base"] = 0.999
    rows = summarise(few, interval=interval)
    assert (rows["low"] >= -100).all() and (rows["low"] < rows["mean"]).all()
    assert rows["high"][1] <= 100 * (1 / 0.999 - 1) and (rows["high"] > rows["mean"]).all()
    assert rows["logprob_difference_high"][1] <= -np.log(0.999)


def test_by_default_an_interval_lies_within_what_single_prompts_show_and_is_the_same_each_time() -> None:
    draws = np.random.default_rng(0).uniform(-100, 30, size=(50, 4))
    rows = frame({("subject", layer): list(row) for layer, row in enumerate(draws)})
    summary = summarise(rows)
    assert (summary["low"] >= draws.min(1)).all() and (summary["high"] <= draws.max(1)).all()
    pd.testing.assert_frame_equal(summary, summarise(rows), check_exact=True)
    pd.testing.assert_frame_equal(summary, summarise(rows, interval="bootstrap", resamples=2000, seed=0))


@pytest.mark.parametrize("interval", ["t", "bootstrap"])
@pytest.mark.parametrize("value", [-7.1, 0.1, -100 / 3])
def test_equal_prompts_have_an_interval_of_no_width(interval: Any, value: float) -> None:
    row = summarise(frame({("subject", 0): [value] * 7}), interval=interval).iloc[0]
    np.testing.assert_allclose([row["low"], row["high"]], value, rtol=1e-12)
    assert interval == "t" or row["low"] == row["high"] == value
