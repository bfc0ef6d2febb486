"""The report's tables of scores: heads with trivial baselines, and differences between heads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

METRICS = ("mIoU", "IoU FG", "AP")
DASH = "–"
MINUS = "−"  # as wide as the plus sign, so that signs stand below each other


@dataclass(frozen=True)
class ResultRow:
    """The scores of one head, or of a trivial baseline to compare it with.

    ``scores`` are mIoU, IoU_FG and AP as ``evaluate`` gives them: 0.5 is shown as 50.0 percent, and
    NaN as a dash. They are means where several seeds were trained; ``deviations`` are then the
    sample standard deviations. ``threshold`` is that of the mIoU, None without one. ``group`` says
    which pairs were scored.
    """

    name: str
    scores: tuple[float, ...]
    deviations: tuple[float | None, ...] = (None, None, None)
    baseline: bool = False
    group: str = ""
    threshold: float | None = None


@dataclass(frozen=True)
class EffectRow:
    """One claim of the paper, as differences of scores between runs of equal seed.

    ``question`` asks, ``compared`` says what is subtracted from what ("ZNet − RGBNet"), and
    ``verdict`` answers in a few words. ``differences`` are mean differences of mIoU and AP,
    ``deviations`` their sample standard deviations over seeds.
    """

    question: str
    compared: str
    differences: tuple[float, float]
    deviations: tuple[float | None, float | None]
    verdict: str


@dataclass(frozen=True)
class ResultGroup:
    """Rows scored on the same pairs, with the best score of each column as it is shown."""

    name: str
    rows: Sequence[ResultRow]
    bests: Sequence[str]


def group_results(rows: Sequence[ResultRow]) -> list[ResultGroup]:
    """Return the rows by group, groups in order of first appearance."""
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return [ResultGroup(name, found, _find_bests(found)) for name, found in groups.items()]


def _find_bests(rows: Sequence[ResultRow]) -> list[str]:
    """The highest of each column as text, so that a digit which is not shown decides nothing."""
    columns = zip(*(row.scores for row in rows), strict=True)
    return [format_percent(max(filter(math.isfinite, c), default=math.nan)) for c in columns]


def format_percent(score: float) -> str:
    """A score in [0, 1] in percent, a dash where it is not finite."""
    return f"{100 * score:.1f}" if math.isfinite(score) else DASH


def format_points(difference: float) -> str:
    """A difference in [-1, 1] in percentage points, signed unless it is zero to the digit shown."""
    shown = format_percent(abs(difference))
    if shown in (DASH, "0.0"):
        return shown
    return f"{'+' if difference > 0 else MINUS}{shown}"
