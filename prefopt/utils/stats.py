"""Means and their standard errors."""

import math
from collections.abc import Sequence

import numpy as np


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (from the sample standard deviation; nan for fewer than two values)."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.nan
    return mean, math.sqrt(variance / n)


def share_error(share: float, n: int) -> float:
    """The standard error of a share of n independent items: sqrt(p (1 - p) / n), as of a binomial count."""
    return math.sqrt(share * (1 - share) / n)


def paired_difference(differences: np.ndarray) -> tuple[float, float, float, float]:
    """The mean of paired differences (n,), the ends of its 95 % interval, and p for a mean of 0.

    The interval is the percentile bootstrap's. p is two-sided, by permutation: under the hypothesis each difference has
    either sign, of which all are tried where they are at most 9999. The same differences give the same figures. Of
    fewer than two differences the mean alone is known; the others are nan.
    """
    from scipy.stats import bootstrap, permutation_test  # takes a second

    mean = float(np.mean(differences))
    if len(differences) < 2:
        return mean, math.nan, math.nan, math.nan
    if not differences.any():
        return 0.0, 0.0, 0.0, 1.0
    drawn = bootstrap((differences,), np.mean, method="percentile", rng=np.random.default_rng(0))
    low, high = map(float, drawn.confidence_interval)
    signs = permutation_test((differences,), np.mean, permutation_type="samples", rng=np.random.default_rng(0))
    return mean, low, high, float(signs.pvalue)


def mean_interval(
    values: Sequence[float], hypothesis: float = 0.0, alternative: str = "two-sided"
) -> tuple[float, float, float, float]:
    """The mean of at least two independent values, the ends of its two-sided 95 % interval, and p for a mean of
    `hypothesis`, by Student's t. Values that are all the same leave no doubt: p is 0, or 1 where none is against it.
    """
    from scipy.stats import t

    mean, error = mean_and_error(list(values))
    degrees = len(values) - 1
    half = float(t.ppf(0.975, degrees)) * error
    away = mean - hypothesis
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = 0.0 if away == 0 else float(np.divide(away, error))
    tails = {"greater": t.sf(statistic, degrees), "less": t.cdf(statistic, degrees)}
    p = tails[alternative] if alternative in tails else 2 * t.sf(abs(statistic), degrees)
    return mean, mean - half, mean + half, float(p)


def detectable(values: Sequence[float], alpha: float, power: float) -> float:
    """The smallest true mean that a two-sided t test of as many values with the same spread would show with a chance of
    `power` (in the usual approximation: the sum of two quantiles of t, times the standard error)."""
    from scipy.stats import t

    _, error = mean_and_error(list(values))
    degrees = len(values) - 1
    return float(t.ppf(1 - alpha / 2, degrees) + t.ppf(power, degrees)) * error


def holm(ps: Sequence[float]) -> list[float]:
    """The p values of several tests, corrected for all of them (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    corrected = [0.0] * len(ps)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected
