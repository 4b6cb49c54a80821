"""Statistics of timed samples. Samples of two variants with one index come from one round of one process."""

from collections.abc import Sequence
from statistics import median

P99 = 0.99


def quantile(samples: Sequence[float], share: float) -> float:
    """The value below which that share of the samples lies, linear between neighbours."""
    ranked = sorted(samples)
    rank = share * (len(ranked) - 1)
    below = int(rank)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (rank - below) * (ranked[above] - ranked[below])


def paired_ratio(samples: Sequence[float], others: Sequence[float]) -> float:
    """Median over the rounds of a sample divided by the other: what slows a whole round down cancels."""
    return median(left / right for left, right in zip(samples, others, strict=True))


def noise(samples: Sequence[float], again: Sequence[float]) -> float:
    """How far two timings of the same thing are apart in half of the rounds, as a share."""
    return median(abs(left / right - 1) for left, right in zip(samples, again, strict=True))
