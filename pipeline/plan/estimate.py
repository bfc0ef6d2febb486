"""A corpus' totals from some of its tars, each with the range that it is expected in.

The ratio estimator: what the sampled tars hold for each byte of them, times the corpus' bytes, each
with the number of tars that it stands for as its weight. Source of the formulas: W. G. Cochran,
Sampling Techniques, 3rd edition, 6.11 (combined ratio estimates of strata) and 3.2 (proportions).
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
    """A figure and the range that holds it with ``CONFIDENCE``."""

    value: float
    low: float
    high: float

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
        """Return it times a factor, itself known to ``relative`` (independent errors)."""
        if relative == 0:
            return Estimate(self.value * factor, self.low * factor, self.high * factor)
        return Estimate.around(self.value * factor, math.hypot(self.relative, relative))

    def stretched(self, relative: float) -> "Estimate":
        """Return it with ends a factor of 1 + ``relative`` further off: of times, never 0."""
        return Estimate(self.value, self.low / (1 + relative), self.high * (1 + relative))

    def __add__(self, other: "Estimate") -> "Estimate":
        """Add as if both erred the same way: they are of the same tars."""
        return Estimate(self.value + other.value, self.low + other.low, self.high + other.high)


NOTHING = Estimate(0.0, 0.0, 0.0)


def ratio_error(
    found: Sequence[float], sizes: Sequence[float], *, weights: Sequence[float]
) -> float:
    """Return the half width of a ratio's range over the ratio.

    ``found`` and ``sizes`` are of the sampled units, each one of ``weights`` units of its stratum;
    all sampled, so weights of 1, is no error. One of several sampled tells nothing of the others:
    ``MAX_RELATIVE``. The scatter is that of all strata together: each has one sampled unit.
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
    """Return the total over all units, which have the size ``whole``, from those sampled."""
    value = float(np.dot(weights, found)) / float(np.dot(weights, sizes)) * whole
    return Estimate.around(value, ratio_error(found, sizes, weights=weights))


def share_range(hits: int, num: int, *, num_units: float = math.inf) -> tuple[float, float]:
    """Return the range of all units' share from ``hits`` of ``num`` tried; (0, 1) for no trials.

    Of the units that were not tried Wilson's range (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927),
    which is not empty for 0 hits, unlike the normal one; what was tried is known.
    """
    if num == 0:
        return 0.0, 1.0
    found = stats.binomtest(hits, num).proportion_ci(CONFIDENCE, method="wilson")
    known = min(num / num_units, 1.0)
    low, high = (known * hits / num + (1 - known) * end for end in (found.low, found.high))
    return float(low), float(high)


def count_distinct(counts: Sequence[int], *, num_forms: int, kept: float) -> float:
    """Return how many distinct prompts some phrases are expected to give.

    ``counts``: how often each phrase occurs; each occurrence takes one of ``num_forms`` prompts at
    random and stays with the probability ``kept``.
    """
    times = np.asarray(counts, dtype=float)
    return float((num_forms * (1 - (1 - kept / num_forms) ** times)).sum())


def growth_exponent(counts: Sequence[int], *, num_forms: int, kept: float) -> float:
    """Return b where distinct prompts grow as occurrences to the power of b, here at the end.

    From the whole and a random half of it: 0 where all phrases are known, 1 where none recurs.
    Heaps' law; exact at the half, so good for tars of about the same size.
    """
    half = count_distinct(counts, num_forms=num_forms, kept=kept / 2)
    whole = count_distinct(counts, num_forms=num_forms, kept=kept)
    return min(max(math.log2(whole / half), 0.0), 1.0) if half > 0 else 0.0
