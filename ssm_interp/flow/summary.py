"""What a sweep says over prompts: means, medians and accuracies of each knockout, with their intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api.typing import SeriesGroupBy
from scipy import special, stats

from ssm_interp.errors import FlowError
from ssm_interp.experiments.values import Interval

KEYS = ["model", "source", "target", "feature_group", "layer", "window_start", "window_size"]
MEASURED = ["unasked", "n_edges", "p_base", "p", "relative_change", "logprob_difference", "hit"]
RESAMPLES = 2000
RESAMPLED_AT_ONCE = 256

Numbers = NDArray[np.float64]


class _Bounds(NamedTuple):
    low: Numbers
    high: Numbers


def summarise(
    frame: pd.DataFrame,
    *,
    level: float = 0.95,
    interval: Interval = "bootstrap",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Aggregate per-prompt rows over prompts, one row per model, source, target, feature group and window.

    Prompts in which the knockout has no edges (an empty role) count as no change, as in the paper; `n_empty` says how
    many there are; `n_first` says how many are asked for the first token of their answer alone.

    Args:
        frame: rows as in `FlowResult.frame`.
        level: of every interval, between 0 and 1.
        interval: of the means: `"bootstrap"`, percentiles of the means of resampled prompts, which lie between the
            smallest and the largest prompt, as skewed as they are; or `"t"`, Student's t, which is symmetric, and cut
            off at what is possible: no change is below -100 %, nor beyond the change to p = 1.
        resamples: how often the bootstrap draws the prompts anew, with replacement.
        seed: of those draws. A row's interval depends on its own prompts and the seed alone.

    Returns:
        The keys `model`, `source`, `target`, `feature_group`, `layer`, `window_start`, `window_size`, in the order in
        which they first occur; then
        `level`; `n` prompts, `n_empty`, `n_first`;
        `mean`, `low`, `high`: of the relative change in %, with its interval;
        `median`, `median_low`, `median_high`: of the same, with the interval between two order statistics that holds
        the level for any distribution (NaN for too few prompts: below 6 at 95 %);
        `logprob_difference`, `logprob_difference_low`, `logprob_difference_high`: its mean in nats, with its interval;
        `median_logprob_difference`;
        `p_base`, `p`: means;
        `accuracy`, `accuracy_low`, `accuracy_high`: the share of prompts still answered correctly, with Wilson's
        interval.
        Where a metric was asked for: `metric`, `value_base`, `value`; `value_difference`, `value_difference_low`,
        `value_difference_high`: the mean of value - value_base, with its interval.
        The interval of a mean is not defined (NaN) for a single prompt, and has no width where all are equal.

    Raises:
        FlowError: missing columns; no rows; a level not between 0 and 1; no such interval; fewer than 1 resample.

    Cost: the bootstrap multiplies a matrix `[resamples, n]` with one `[n, rows]`, in pieces; 768 rows over 1,000
        prompts take about half a second.
    Source: Wilson 1927 (accuracy); Efron 1979 (bootstrap); David and Nagaraja, Order Statistics, 7.1 (median).

    Example:
        >>> summarise(result.frame, interval="bootstrap")[["source", "layer", "mean", "low", "high"]]  # doctest: +SKIP
    """
    _check(frame, level, interval, resamples)
    flags = {"empty": frame["n_edges"] == 0, "first": frame["unasked"] > 0}
    groups = frame.assign(**flags).groupby(KEYS, sort=False, observed=True, dropna=False)
    n, hits = groups.size().to_numpy(), groups["hit"].sum().to_numpy()
    in_order, ends = np.argsort(groups.ngroup(), kind="stable"), np.cumsum(n)

    def samples(column: str) -> list[Numbers]:
        return np.split(frame[column].to_numpy(float)[in_order], ends[:-1])

    def of_mean(column: str) -> _Bounds:
        if interval == "bootstrap":
            return _bootstrap(samples(column), level, resamples, seed)
        bounds = _student(groups[column].mean().to_numpy(), groups[column].std(ddof=1).to_numpy(), n, level)
        least, most = possible[column]
        ceiling = most.groupby(groups.ngroup()).mean().to_numpy()
        return _Bounds(*(bound.clip(least, ceiling) for bound in bounds))

    base = frame["p_base"].astype(float).clip(lower=np.finfo(float).tiny)
    possible = {"relative_change": (-100.0, 100 * (1 / base - 1)), "logprob_difference": (-np.inf, -np.log(base))}
    change, logprob = of_mean("relative_change"), of_mean("logprob_difference")
    with_metric = {}
    if "value" in frame:
        frame = frame.assign(value_difference=frame["value"] - frame["value_base"])
        groups = frame.assign(**flags).groupby(KEYS, sort=False, observed=True, dropna=False)
        possible["value_difference"] = (-np.inf, pd.Series(np.inf, frame.index))
        moved = of_mean("value_difference")
        with_metric = {
            "metric": groups["metric"].first(),
            "value_base": groups["value_base"].mean(),
            "value": groups["value"].mean(),
            "value_difference": groups["value_difference"].mean(),
            "value_difference_low": moved.low,
            "value_difference_high": moved.high,
        }
    median, accuracy = _order_statistics(samples("relative_change"), level), _wilson(hits, n, level)
    return pd.DataFrame(
        {
            "level": level,
            "n": groups.size(),
            "n_empty": groups["empty"].sum(),
            "n_first": groups["first"].sum(),
            "mean": groups["relative_change"].mean(),
            "low": change.low,
            "high": change.high,
            "median": groups["relative_change"].median(),
            "median_low": median.low,
            "median_high": median.high,
            "logprob_difference": groups["logprob_difference"].mean(),
            "logprob_difference_low": logprob.low,
            "logprob_difference_high": logprob.high,
            "median_logprob_difference": groups["logprob_difference"].median(),
            "p_base": groups["p_base"].mean(),
            "p": groups["p"].mean(),
            "accuracy": hits / n,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
            **with_metric,
        }
    ).reset_index()


def mean_interval(groups: SeriesGroupBy, level: float) -> pd.DataFrame:
    """`mean`, `low`, `high` (percentiles of the means of resamples) and `n` of each group."""
    means = groups.agg(mean="mean", n="size")
    samples = groups.apply(lambda values: values.to_numpy(float)).tolist()
    bounds = _bootstrap(samples, level, RESAMPLES, seed=0)
    return means.assign(low=bounds.low, high=bounds.high)[["mean", "low", "high", "n"]]


def _check(frame: pd.DataFrame, level: float, interval: str, resamples: int) -> None:
    if missing := [column for column in KEYS + MEASURED if column not in frame.columns]:
        raise FlowError(f"a summary needs a table with the columns {KEYS + MEASURED}; these are missing: {missing}")
    if frame.empty:
        raise FlowError("a summary needs at least one row; the table is empty")
    if not 0 < level < 1:
        raise FlowError(f"the level of an interval lies between 0 and 1, such as 0.95, got {level}")
    if interval not in ("t", "bootstrap"):
        raise FlowError(f"there is no interval {interval!r}: give 't' or 'bootstrap'")
    if resamples < 1:
        raise FlowError(f"the bootstrap needs at least one resample, got {resamples}; 2000 are usual")


def _student(mean: Numbers, deviation: Numbers, n: NDArray[np.int64], level: float) -> _Bounds:
    half = stats.t.ppf((1 + level) / 2, n - 1) * deviation / np.sqrt(n)
    return _Bounds(mean - half, mean + half)


def _bootstrap(samples: list[Numbers], level: float, resamples: int, seed: int) -> _Bounds:
    """Percentiles of the resampled means; samples of one size share the draws."""
    bounds = np.full((2, len(samples)), np.nan)
    sizes = np.array([len(sample) for sample in samples])
    for n in np.unique(sizes[sizes > 1]):
        (which,) = np.nonzero(sizes == n)
        columns = np.stack([samples[index] for index in which], axis=1)
        draw, share = np.random.default_rng(seed), np.full(n, 1 / n)
        pieces = [min(RESAMPLED_AT_ONCE, resamples - done) for done in range(0, resamples, RESAMPLED_AT_ONCE)]
        means = np.concatenate([draw.multinomial(n, share, size=piece) / n @ columns for piece in pieces])
        quantiles = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
        bounds[:, which] = quantiles.clip(columns.min(0), columns.max(0))  # rounding: the means of equal numbers differ
    return _Bounds(*bounds)


def _order_statistics(samples: list[Numbers], level: float) -> _Bounds:
    """`scipy.stats.quantile_test(sample, p=0.5).confidence_interval(level)` of many samples."""
    bounds = np.full((2, len(samples)), np.nan)
    ranks = stats.binom.ppf((1 - level) / 2, [len(sample) for sample in samples], 0.5).astype(int)
    for index, (sample, rank) in enumerate(zip(samples, ranks, strict=True)):
        if rank:
            bounds[:, index] = np.sort(sample)[[rank - 1, len(sample) - rank]]
    return _Bounds(*bounds)


def _wilson(hits: NDArray[np.int64], n: NDArray[np.int64], level: float) -> _Bounds:
    """`scipy.stats.binomtest(hits, n).proportion_ci(level, "wilson")` for arrays of them."""
    z2 = special.ndtri((1 + level) / 2) ** 2
    centre = (hits + z2 / 2) / (n + z2)
    half = np.sqrt(z2 * (hits * (n - hits) / n + z2 / 4)) / (n + z2)
    return _Bounds((centre - half).clip(0), (centre + half).clip(max=1))
