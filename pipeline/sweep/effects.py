"""Effects between two variants of a sweep, as paired differences between heads of equal seed.

Data flow: a sweep's rows -> the figures of two variants by seed -> their differences, with mean and
sample standard deviation over seeds.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.sweep.results import Row, Spread

METRICS = ("mIoU", "AP")
LEAST = 0.001  # smaller differences, below a tenth of a point, count as none
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, 97.5 %, at 1 to 9 degrees of freedom; the last is used for more."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """Two variants whose difference answers a question."""

    question: str
    ours: str  # the variant that is expected to be better
    theirs: str
    scored_on: str  # validation, or a test's name


@dataclass(frozen=True, slots=True)
class Effect:
    """A difference ``ours`` minus ``theirs``, of metrics in [0, 1]."""

    contrast: Contrast
    spreads: dict[str, Spread]  # by metric

    @property
    def verdict(self) -> str:
        """The answer of both metrics, of those that differ beyond chance (``_sign``)."""
        signs = {name: _sign(spread) for name, spread in self.spreads.items()}
        found = set(signs.values())
        if found == {0}:
            reach = max(abs(x.mean) + _half_width(x) for x in self.spreads.values())
            return "no difference" if reach < LEAST else "not beyond the spread"
        if 0 in found:
            (name,) = [name for name, sign in signs.items() if sign]
            return f"in {name} alone" + ("" if signs[name] > 0 else ", the other way round")
        return "mixed" if len(found) > 1 else "yes" if found == {1} else "the other way round"


def _sign(spread: Spread) -> int:
    """Return a mean's sign if it is at least ``LEAST`` and its 95 % interval excludes 0, else 0."""
    if abs(spread.mean) < LEAST or abs(spread.mean) <= _half_width(spread):
        return 0
    return 1 if spread.mean > 0 else -1


def _half_width(spread: Spread) -> float:
    """Return half the width of a mean's 95 % interval, infinite for one seed."""
    if spread.deviation is None:
        return math.inf
    quantile = T_975[min(spread.num - 1, len(T_975)) - 1]
    return quantile * spread.deviation / spread.num**0.5


def measure_effects(rows: Sequence[Row], contrasts: Iterable[Contrast]) -> list[Effect]:
    """Return the effect of each contrast whose variants have a seed in common."""
    heads: defaultdict[tuple[str, str], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row["status"] == "done" and row["seed"] is not None:
            heads[row["variant"], row["scored_on"]][row["seed"]] = row
    found = []
    for contrast in contrasts:
        ours = heads[contrast.ours, contrast.scored_on]
        theirs = heads[contrast.theirs, contrast.scored_on]
        seeds = sorted(ours.keys() & theirs.keys())
        if seeds:
            spreads = {
                name: Spread.of([ours[seed][name] - theirs[seed][name] for seed in seeds])
                for name in METRICS
            }
            found.append(Effect(contrast, spreads))
    return found
