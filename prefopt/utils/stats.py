"""Means and their standard errors."""

import math


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (from the sample standard deviation; nan for fewer than two values)."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.nan
    return mean, math.sqrt(variance / n)
