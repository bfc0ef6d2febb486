"""The report's tables: scores, the paper's effects as differences of scores, and facts.

Means are right-aligned and what is after their ± stands apart, so that digits of equal weight stand
below each other, also where a row has no ±.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.report.text import DASH, escape, format_percent, format_points, join_lines

METRICS = ("mIoU", "IoU FG", "AP")
METRICS_NOTE = (
    "mIoU is the mean over pairs (an image with one phrase) of the intersection over union of "
    "predicted and true foreground, at the best of 49 thresholds from 0.02 to 0.98. "
    "IoU FG counts the pixels of all pairs together, at its own best threshold, so large objects "
    "weigh more. AP is the area under the precision-recall curve of all pixels."
)
BEST_NOTE = "In percent; higher is better; the best of each column is bold. "
BEST_IN_GROUP_NOTE = "In percent; higher is better; the best of each column is bold in each group. "
SPREAD_NOTE = "± is the sample standard deviation over seeds. "
EFFECTS_NOTE = (
    "In percentage points, + where the first named scores higher. Each difference is between runs "
    "of equal seed: the mean over seeds ± the sample standard deviation."
)


@dataclass(frozen=True)
class ResultRow:
    """The scores of one head, or of a trivial baseline to hold it against.

    ``mIoU`` and ``IoU_FG`` are in [0, 1], as ``evaluate`` gives them, means over seeds where there
    are several, or not finite where there is no score. So is ``AP`` as a rule; CLIPSeg's leaves it
    where a head says nearly the same everywhere (``models.heads.metrics``). ``note`` is a remark
    beside the name. ``group`` says which pairs were scored. ``deviations`` are the sample standard
    deviations of the three scores over ``seeds`` seeds; None for one run.

    Raises:
        ValueError: a finite score or deviation out of its range, not three deviations, no seeds.
    """

    name: str
    mIoU: float
    IoU_FG: float
    AP: float
    baseline: bool = False
    note: str = ""
    group: str = ""
    deviations: tuple[float, float, float] | None = None
    seeds: int | None = None

    def __post_init__(self) -> None:
        _check_range(f"scores of {self.name!r}", (self.mIoU, self.IoU_FG), 0, 1)
        if self.deviations is not None:
            if len(self.deviations) != len(METRICS):
                raise ValueError(
                    f"deviations of {self.name!r} must be {len(METRICS)}, of {', '.join(METRICS)}, "
                    f"but got {len(self.deviations)}"
                )
            _check_range(f"deviations of {self.name!r}", self.deviations[:2], 0, 1)
            _check_range(f"deviation of AP of {self.name!r}", self.deviations[2:], 0, math.inf)
        _check_seeds(self.name, self.seeds)

    @property
    def scores(self) -> tuple[float, float, float]:
        """In the order of the columns."""
        return self.mIoU, self.IoU_FG, self.AP


@dataclass(frozen=True)
class EffectRow:
    """One claim of the paper, as differences of scores between runs of equal seed.

    ``question`` asks, ``compared`` says what is taken from what ("ZNet − RGBNet"). ``mIoU`` and
    ``AP`` are mean differences, that of ``mIoU`` in [-1, 1], their deviations sample standard
    deviations over ``seeds`` seeds, None for one seed. What is not finite is shown as a dash.
    ``verdict`` is the answer in a few words.

    Raises:
        ValueError: a finite difference or deviation out of its range, no seeds.
    """

    question: str
    compared: str
    mIoU: float
    AP: float
    mIoU_deviation: float | None
    AP_deviation: float | None
    seeds: int
    verdict: str

    def __post_init__(self) -> None:
        _check_range(f"difference of mIoU of {self.compared!r}", (self.mIoU,), -1, 1)
        for deviation, high in ((self.mIoU_deviation, 2.0), (self.AP_deviation, math.inf)):
            if deviation is not None:
                _check_range(f"deviations of {self.compared!r}", (deviation,), 0.0, high)
        _check_seeds(self.compared, self.seeds)


def _check_range(what: str, values: Sequence[float], low: float, high: float) -> None:
    for value in values:
        if math.isfinite(value) and not low <= value <= high:
            raise ValueError(
                f"{what} must be in [{low:g}, {high:g}], but got {value}; divide percentages by 100"
            )


def _check_seeds(name: str, seeds: int | None) -> None:
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds of {name!r} must be at least 1, but got {seeds}")


def render_results(rows: Sequence[ResultRow], note: str = "") -> str:
    """The scores, group by group in order of first appearance, with ``note`` above our own."""
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    spread = any(row.deviations is not None for row in rows)
    seeds = any(row.seeds is not None for row in rows)
    names = [_render_mean(name, None, spread=spread) for name in METRICS] + ["Seeds"] * seeds
    heads = "".join(f'<th scope="col" class="number">{name}</th>' for name in names)
    lines = [f'<thead><tr><th scope="col">Head</th>{heads}</tr></thead>']
    for members in groups.values():
        lines += _render_group(members, spread=spread, seeds=seeds)
    best = BEST_IN_GROUP_NOTE if len(groups) > 1 else BEST_NOTE
    notes = [escape(note)] * bool(note) + [best + SPREAD_NOTE * spread + METRICS_NOTE]
    return _render_scroll("results", lines, notes)


def _render_group(rows: Sequence[ResultRow], *, spread: bool, seeds: bool) -> list[str]:
    """The rows of one group as two bodies: heads under the group's name, and baselines."""
    bests = [_find_best(scores) for scores in zip(*(row.scores for row in rows), strict=True)]
    columns = 1 + len(METRICS) + seeds
    lines = ['<tbody class="pairs">']
    if group := rows[0].group:
        lines.append(_render_heading("group", escape(group), columns))
    lines += [_render_result(r, bests, spread, seeds) for r in rows if not r.baseline]
    if any(row.baseline for row in rows):
        lines += ['</tbody>\n<tbody class="baseline">']
        lines.append(_render_heading("kind", "Trivial baselines", columns))
        lines += [_render_result(r, bests, spread, seeds) for r in rows if r.baseline]
    return [*lines, "</tbody>"]


def _find_best(scores: Sequence[float]) -> str:
    """The highest as it is shown: a hidden digit decides nothing."""
    return format_percent(max(filter(math.isfinite, scores), default=math.nan))


def _render_heading(kind: str, text: str, columns: int) -> str:
    return f'<tr class="{kind}"><th scope="rowgroup" colspan="{columns}">{text}</th></tr>'


def _render_result(row: ResultRow, bests: Sequence[str], spread: bool, seeds: bool) -> str:
    remark = f' <span class="remark">{escape(row.note)}</span>' if row.note else ""
    cells = [f'<th scope="row"><bdi>{escape(row.name)}</bdi>{remark}</th>']
    deviations = row.deviations or (None,) * len(METRICS)
    for score, deviation, best in zip(row.scores, deviations, bests, strict=True):
        text = format_percent(score)
        mean = f"<b>{text}</b>" if text == best != DASH else text
        cells.append(_render_number(_render_mean(mean, deviation, spread=spread)))
    if seeds:
        cells.append(_render_number(DASH if row.seeds is None else str(row.seeds)))
    return f"<tr>{''.join(cells)}</tr>"


def render_effects(rows: Sequence[EffectRow]) -> str:
    """The claims, each with its differences and its answer."""
    spread = any(d is not None for row in rows for d in (row.mIoU_deviation, row.AP_deviation))
    names = [_render_mean(name, None, spread=spread) for name in ("mIoU", "AP")] + ["Seeds"]
    numbers = "".join(f'<th scope="col" class="number">{name}</th>' for name in names)
    lines = [
        f'<thead><tr><th scope="col">Question</th>{numbers}'
        '<th scope="col" class="verdict">Answer</th></tr></thead>',
        '<tbody class="pairs">',
        *(_render_effect(row, spread=spread) for row in rows),
        "</tbody>",
    ]
    return _render_scroll("results effects", lines, [EFFECTS_NOTE])


def _render_effect(row: EffectRow, *, spread: bool) -> str:
    cells = [
        f'<th scope="row">{escape(row.question)} '
        f'<span class="compared"><bdi>{escape(row.compared)}</bdi></span></th>'
    ]
    for mean, deviation in ((row.mIoU, row.mIoU_deviation), (row.AP, row.AP_deviation)):
        cells.append(_render_number(_render_mean(format_points(mean), deviation, spread=spread)))
    cells += [_render_number(str(row.seeds)), f'<td class="verdict">{escape(row.verdict)}</td>']
    return f"<tr>{''.join(cells)}</tr>"


def _render_mean(mean: str, deviation: float | None, *, spread: bool) -> str:
    """A mean with its deviation, or with as much room where the table has ``spread`` elsewhere."""
    if not spread:
        return mean
    text = "" if deviation is None or mean == DASH else f" ± {format_percent(deviation)}"
    return f'{mean}<span class="spread">{text}</span>'


def _render_number(shown: str) -> str:
    return f'<td class="number">{shown}</td>'


def _render_scroll(kind: str, lines: Sequence[str], notes: Sequence[str]) -> str:
    table = f'<div class="scroll"><table class="{kind}">\n{join_lines(lines)}\n</table></div>'
    return join_lines([table, *(f'<p class="note">{note}</p>' for note in notes)])


def render_facts(facts: Mapping[str, str]) -> str:
    """Labels beside their values."""
    rows = [
        f'<tr><th scope="row">{escape(label)}</th><td>{escape(value)}</td></tr>'
        for label, value in facts.items()
    ]
    return f'<table class="facts">\n{join_lines(rows)}\n</table>'
