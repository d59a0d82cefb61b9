"""What numbers over seeds say. The statistics are scipy's; here stands which of them, and what a failed run counts.

A run that diverged, or never reached its target, is infinitely bad (`math.inf` where lower is better, else
`-math.inf`): it counts against its optimizer, never for it.
"""

import math

import numpy as np
from scipy import stats

LEVEL = 0.95
FEWEST = 3  # runs below which nothing is called best
INTERVALS = "95 % intervals, from 3 runs on: Student's t for a mean; order statistics for a median, which take 6"
TESTS = (
    "p < 0.05 in the t test of the differences paired by seed, or in the exact Mann-Whitney test where a run failed or "
    "all differences are equal; at least 3 common seeds, all runs of equal versions and from clean commits"
)


def summarize(values: list[float]) -> dict:
    """At least one run in one number, as fields of koala.tables.table.Number.

    `statistic` and `value`: their mean, or, as soon as one failed, their median (None: the median itself is a failure).
    `low` and `high` bound it at LEVEL (None: too few runs, or an end that is a failure). `std` is the sample standard
    deviation (n - 1) of the runs that did not fail.
    """
    array = np.array(values, dtype=float)
    good = array[np.isfinite(array)]
    summary = {"n": len(array), "finite": len(good), "std": float(good.std(ddof=1)) if len(good) > 1 else None}
    if len(good) == len(array):
        low, high = mean_interval(array)
        return summary | {"statistic": "mean", "value": float(array.mean()), "low": low, "high": high}
    with np.errstate(invalid="ignore"):
        middle = float(np.median(array))
    interval = stats.quantile_test(array, p=0.5).confidence_interval(LEVEL)
    value, low, high = (float(x) if math.isfinite(x) else None for x in (middle, interval.low, interval.high))
    return summary | {"statistic": "median", "value": value, "low": low, "high": high}


def mean_interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """Student's t interval of the mean of independent runs; (None, None) for fewer than FEWEST.

    Two runs allow one too, 12.7 standard errors either way: around 4 and 7 epochs it begins far below none.
    """
    if len(values) < FEWEST:
        return None, None
    mean, error = float(np.mean(values)), float(stats.sem(values))
    if error == 0:
        return mean, mean
    low, high = stats.t.interval(LEVEL, len(values) - 1, loc=mean, scale=error)
    return float(low), float(high)


def compare(one: dict[int, float], other: dict[int, float]) -> tuple[float, float]:
    """How much lower or higher an optimizer's runs are than another's, paired by seed (negative: lower), and p.

    A failure has no difference, so that ranks must do. Those of the runs, not of the differences: that one optimizer
    always fails on five seeds and the other never does is significant, which Wilcoxon's test misses (p = 0.06). Ranks
    decide as well where all differences are equal, such as one epoch: without spread, the t test is always sure.
    """
    seeds = sorted(one.keys() & other.keys())
    first, second = (np.array([runs[seed] for seed in seeds]) for runs in (one, other))
    if np.array_equal(first, second):
        return 0.0, 1.0
    if np.isfinite([first, second]).all() and np.ptp(apart := first - second) > 1e-9 * np.abs(apart).max():
        return float(apart.mean()), float(stats.ttest_1samp(apart, 0.0).pvalue)
    test = stats.mannwhitneyu(first, second, method="exact")
    return float(test.statistic) - len(seeds) ** 2 / 2, float(test.pvalue)


def significant(one: dict[int, float], other: dict[int, float]) -> float:
    """The difference of `compare` if it is significant, else 0; 0 with fewer than FEWEST pairs."""
    if len(one.keys() & other.keys()) < FEWEST:
        return 0.0
    difference, p = compare(one, other)
    return difference if p < 1 - LEVEL else 0.0


def sigmas(difference: float, std: float | None, n: int, other_std: float | None, other_n: int) -> float | None:
    """How many standard errors a difference of two means is; an unknown spread of the other counts as none.

    None where ours is unknown: one run has no spread.
    """
    if std is None:
        return None
    error = math.hypot(std / math.sqrt(n), (other_std or 0.0) / math.sqrt(other_n))
    return abs(difference) / error if error else None
