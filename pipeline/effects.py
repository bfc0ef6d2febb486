"""The paper's effects, as differences between heads of equal seed.

Data flow: a sweep's rows -> the figures of two variants by seed -> their differences, with mean and
sample standard deviation over seeds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.sweep_results import Row, Spread

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

    @property
    def verdict(self) -> str:
        """What both metrics say where each differs beyond chance, as ``_sign`` has it."""
        signs = {name: _sign(spread) for name, spread in self.spreads.items()}
        found = set(signs.values())
        if found == {0}:
            small = all(abs(spread.mean) < LEAST for spread in self.spreads.values())
            return "no difference" if small else "not beyond the spread"
        if 0 in found:
            (name,) = [name for name, sign in signs.items() if sign]
            return f"in {name} alone" + ("" if signs[name] > 0 else ", the other way round")
        return "mixed" if len(found) > 1 else "yes" if found == {1} else "the other way round"


def _sign(spread: Spread) -> int:
    """1 or -1 where a mean is ``LEAST`` or more from 0 and beyond its 95 % interval, else 0."""
    if spread.deviation is None or abs(spread.mean) < LEAST:
        return 0
    quantile = T_975[min(spread.num - 1, len(T_975)) - 1]
    if abs(spread.mean) <= quantile * spread.deviation / spread.num**0.5:
        return 0
    return 1 if spread.mean > 0 else -1


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
            found.append(Effect(comparison, spreads))
    return found


def _is_of(row: Row, variant: str, scored_on: str) -> bool:
    return bool(
        row["status"] == "done"
        and row["seed"] is not None
        and (row["variant"], row["scored_on"]) == (variant, scored_on)
    )
