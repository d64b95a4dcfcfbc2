"""Metrics per prompt and over prompts, against numpy and scipy by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from ssm_interp.flow import answer_metrics, hits, summarise


def frame(changes: dict[tuple[str, int], list[float]], empty: int = 0) -> pd.DataFrame:
    rows = []
    for (source, layer), values in changes.items():
        for number, change in enumerate(values):
            p = 0.5 * (1 + change / 100)
            rows.append(
                {
                    "prompt_id": f"p{number}",
                    "model": "m",
                    "source": source,
                    "target": "last",
                    "layer": layer,
                    "window_start": layer,
                    "window_size": 2,
                    "n_edges": 0 if number < empty else 3,
                    "p_base": 0.5,
                    "p": p,
                    "relative_change": change,
                    "logprob_difference": np.log(p / 0.5),
                    "hit": change > -50,
                }
            )
    return pd.DataFrame(rows)


def test_answer_metrics_are_the_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(63, 17, generator=generator) * 5
    base = torch.randn(63, 17, generator=generator) * 5
    ids = torch.randint(17, (63,), generator=generator)
    found = answer_metrics(logits, base, ids)
    p, p_base = (
        (np.exp(x) / np.exp(x).sum(1, keepdims=True))[np.arange(63), ids.numpy()]
        for x in (logits.double().numpy(), base.double().numpy())
    )
    np.testing.assert_allclose(found["p"], p, rtol=1e-12)
    np.testing.assert_allclose(found["p_base"], p_base, rtol=1e-12)
    np.testing.assert_allclose(found["relative_change"], 100 * (p - p_base) / p_base, rtol=1e-9)
    np.testing.assert_allclose(found["logprob_difference"], np.log(p) - np.log(p_base), rtol=1e-9)
    assert found["hit"].tolist() == (logits.argmax(1) == ids).tolist()


def test_no_change_is_exactly_none_and_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1.0, 2.0]])
    same = answer_metrics(logits, logits, torch.tensor([0, 2]))
    assert same["relative_change"].tolist() == same["logprob_difference"].tolist() == [0.0, 0.0]
    gone = answer_metrics(-logits, logits, torch.tensor([0, 2]))
    assert gone["relative_change"][0] == -100
    assert gone["logprob_difference"].isfinite().all()


def test_a_tie_for_the_first_place_is_a_hit() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert hits(logits, torch.tensor([0, 1, 2])).tolist() == [True, True, False]


def test_summary_against_scipy() -> None:
    values = np.random.default_rng(0).normal(-30, 20, size=57)
    row = summarise(frame({("subject", 3): values.tolist()}, empty=4)).iloc[0]
    low, high = stats.t.interval(0.95, 56, loc=values.mean(), scale=stats.sem(values))
    assert (row["n"], row["n_empty"], row["window_start"], row["window_size"]) == (57, 4, 3, 2)
    np.testing.assert_allclose([row["mean"], row["median"]], [values.mean(), np.median(values)], rtol=1e-12)
    np.testing.assert_allclose([row["low"], row["high"]], [low, high], rtol=1e-12)
    np.testing.assert_allclose(row["accuracy"], (values > -50).mean(), rtol=1e-12)
    logs = np.log1p(values / 100)
    np.testing.assert_allclose(row["logprob_difference"], logs.mean(), rtol=1e-9)
    np.testing.assert_allclose(row["median_logprob_difference"], np.median(logs), rtol=1e-9)
    np.testing.assert_allclose([row["p_base"], row["p"]], [0.5, 0.5 * (1 + values.mean() / 100)], rtol=1e-12)


def test_groups_stay_apart_and_in_order() -> None:
    summary = summarise(frame({("subject", 1): [-10.0, -20.0], ("last", 0): [5.0, 5.0], ("subject", 0): [0.0, -2.0]}))
    assert summary[["source", "layer", "mean"]].to_numpy().tolist() == [
        ["subject", 1, -15.0],
        ["last", 0, 5.0],
        ["subject", 0, -1.0],
    ]
    assert summary.loc[1, "low"] == summary.loc[1, "high"] == 5.0


def test_one_prompt_has_no_interval() -> None:
    row = summarise(frame({("subject", 0): [-7.0]})).iloc[0]
    assert row["mean"] == row["median"] == pytest.approx(-7.0)
    assert np.isnan(row["low"])
    assert np.isnan(row["high"])
