"""The paper's effects, as differences between heads of equal seed.

Data flow: a sweep's rows -> the figures of two variants by seed -> their differences, with mean and
sample standard deviation over seeds.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.sweep.results import Row, Spread

METRICS = ("mIoU", "AP")
LEAST = 0.001  # a difference under a tenth of a point is none, however steady
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, 97.5 %, at 1 to 9 degrees of freedom; more seeds are judged by the last."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two variants whose difference answers a question."""

    question: str
    ours: str  # variant that the question expects to be better
    theirs: str
    scored_on: str


@dataclass(frozen=True, slots=True)
class Effect:
    """A difference ``ours`` minus ``theirs``, of metrics in [0, 1]."""

    comparison: Comparison
    spreads: dict[str, Spread]  # by metric
    defined: bool = True  # no head's AP left [0, 1], as CLIPSeg's can where a head is near constant

    @property
    def verdict(self) -> str:
        """What both metrics say where each differs beyond chance, as ``_sign`` has it."""
        if not self.defined:
            return "a head's AP is out of range"
        signs = {name: _sign(spread) for name, spread in self.spreads.items()}
        found = set(signs.values())
        if found == {0}:
            none = all(_reach(spread) < LEAST for spread in self.spreads.values())
            return "no difference" if none else "not beyond the spread"
        if 0 in found:
            (name,) = [name for name, sign in signs.items() if sign]
            return f"in {name} alone" + ("" if signs[name] > 0 else ", the other way round")
        return "mixed" if len(found) > 1 else "yes" if found == {1} else "the other way round"


def _sign(spread: Spread) -> int:
    """1 or -1 where a mean is ``LEAST`` or more from 0 and beyond its 95 % interval, else 0."""
    if abs(spread.mean) < LEAST or abs(spread.mean) <= _half_width(spread):
        return 0
    return 1 if spread.mean > 0 else -1


def _reach(spread: Spread) -> float:
    """How far from 0 the 95 % interval's farther end lies."""
    return abs(spread.mean) + _half_width(spread)


def _half_width(spread: Spread) -> float:
    """Half the 95 % interval of a mean; infinite for one seed."""
    if spread.deviation is None:
        return math.inf
    quantile = T_975[min(spread.num - 1, len(T_975)) - 1]
    return quantile * spread.deviation / spread.num**0.5


def measure_effects(rows: Sequence[Row], comparisons: Iterable[Comparison]) -> list[Effect]:
    """Return the effect of each comparison whose two variants have a seed in common."""
    found = []
    for comparison in comparisons:
        ours, theirs = (
            {row["seed"]: row for row in rows if _is_of(row, variant, comparison.scored_on)}
            for variant in (comparison.ours, comparison.theirs)
        )
        seeds = sorted(ours.keys() & theirs.keys())
        if seeds:
            spreads = {
                name: Spread.of([ours[seed][name] - theirs[seed][name] for seed in seeds])
                for name in METRICS
            }
            scores = [side[seed]["AP"] for side in (ours, theirs) for seed in seeds]
            found.append(Effect(comparison, spreads, all(0.0 <= x <= 1.0 for x in scores)))
    return found


def _is_of(row: Row, variant: str, scored_on: str) -> bool:
    return bool(
        row["status"] == "done"
        and row["seed"] is not None
        and (row["variant"], row["scored_on"]) == (variant, scored_on)
    )
