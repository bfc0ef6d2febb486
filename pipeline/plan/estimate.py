"""Totals of a corpus from some of its tars, with their confidence ranges.

The combined ratio estimator of a stratified sample: what the sampled tars hold a byte, each
weighted by the number of tars in its stratum, times the bytes of the corpus. Source of the
formulas: W. G. Cochran, Sampling Techniques, 3rd edition, 6.11 and, for shares, 3.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
MAX_RELATIVE = 1.0  # beyond it a range says "anything from nothing to twice"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its range, which holds the true value with a probability of ``CONFIDENCE``."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> "Estimate":
        """Return a value without doubt."""
        return cls(value, value, value)

    @classmethod
    def around(cls, value: float, relative: float) -> "Estimate":
        """Return a value with a half width relative to it, at most ``MAX_RELATIVE``."""
        relative = min(relative, MAX_RELATIVE)
        return cls(value, value * (1 - relative), value * (1 + relative))

    @property
    def relative(self) -> float:
        """Half the range over the value; 0 for a value of 0."""
        return (self.high - self.low) / (2 * self.value) if self.value else 0.0

    def scaled(self, factor: float, *, relative: float = 0.0) -> "Estimate":
        """Multiply by a factor, which has itself an independent error of ``relative``."""
        if relative == 0:
            return Estimate(self.value * factor, self.low * factor, self.high * factor)
        return Estimate.around(self.value * factor, math.hypot(self.relative, relative))

    def stretched(self, relative: float) -> "Estimate":
        """Move each end of the range by a factor of 1 + ``relative``; a time stays above 0."""
        return Estimate(self.value, self.low / (1 + relative), self.high * (1 + relative))

    def __add__(self, other: "Estimate") -> "Estimate":
        """Add, as if both erred in the same direction: they come from the same tars."""
        return Estimate(self.value + other.value, self.low + other.low, self.high + other.high)


NOTHING = Estimate(0.0, 0.0, 0.0)


def ratio_error(
    found: Sequence[float], sizes: Sequence[float], *, weights: Sequence[float]
) -> float:
    """Return the half width of the range of the ratio of ``found`` to ``sizes``, over the ratio.

    Each sampled unit is one of ``weights`` units in its stratum. Weights of 1, so all units
    sampled, give 0; a single sampled unit of several gives ``MAX_RELATIVE``. A stratum has one
    sampled unit, so the scatter is taken over all strata.
    """
    y, x, w = (np.asarray(values, dtype=float) for values in (found, sizes, weights))
    num, total = len(y), float(w @ y)
    if total == 0 or (w <= 1).all():
        return 0.0
    if num < 2:
        return MAX_RELATIVE
    residuals = y - total / (w @ x) * x
    variance = float((w * (w - 1)).sum()) * float((residuals**2).sum()) / (num - 1)
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, num - 1)
    return min(float(quantile) * math.sqrt(variance) / total, MAX_RELATIVE)


def estimate_total(
    found: Sequence[float], sizes: Sequence[float], *, weights: Sequence[float], whole: float
) -> Estimate:
    """Return the total over all units, whose sizes add up to ``whole``, from the sampled ones."""
    value = float(np.dot(weights, found)) / float(np.dot(weights, sizes)) * whole
    return Estimate.around(value, ratio_error(found, sizes, weights=weights))


def share_range(hits: int, num: int, *, num_units: float = math.inf) -> tuple[float, float]:
    """Return the range of the share of hits among all units, after ``hits`` in ``num`` trials.

    The tried units are known. For the others it is Wilson's range (E. B. Wilson, J. Am. Stat.
    Assoc. 22, 1927), which is not empty for 0 hits, unlike the normal one. No trials give (0, 1).
    """
    if num == 0:
        return 0.0, 1.0
    found = stats.binomtest(hits, num).proportion_ci(CONFIDENCE, method="wilson")
    known = min(num / num_units, 1.0)
    low, high = (known * hits / num + (1 - known) * end for end in (found.low, found.high))
    return float(low), float(high)


def count_distinct(counts: Sequence[float], *, num_forms: int, kept: float) -> float:
    """Return the expected number of distinct prompts.

    ``counts`` are the occurrences of each phrase. Each occurrence becomes one of ``num_forms``
    prompts at random, and is stored with the probability ``kept``.
    """
    times = np.asarray(counts, dtype=float)
    return float((num_forms * (1 - (1 - kept / num_forms) ** times)).sum())


def growth_exponent(counts: Sequence[float], *, num_forms: int, kept: float) -> float:
    """Return b of Heaps' law: distinct prompts grow as occurrences to the power of b.

    From the whole and a random half of it, so good for tars of about the same size. 0 where a
    larger tar has no new prompts, 1 where no phrase occurs twice.
    """
    half = count_distinct(counts, num_forms=num_forms, kept=kept / 2)
    whole = count_distinct(counts, num_forms=num_forms, kept=kept)
    return min(max(math.log2(whole / half), 0.0), 1.0) if half > 0 else 0.0
