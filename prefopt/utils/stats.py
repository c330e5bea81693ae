"""Means and their standard errors."""

import math

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
