"""A report of a run: one HTML file that opens without a network.

Pictures are inlined, the style sheet is in the page, there are no scripts, and a content security
policy forbids all else. Every text is escaped: phrases come from a corpus, so anybody wrote them.
"""

import base64
import html
import io
import itertools
import math
import os
import unicodedata
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pipeline import overlay

DASH = "–"
CELL_PX = 168  # a picture's width on the page
PICTURE_PX = 2 * CELL_PX  # and in the file: sharp on a screen of two pixels to one
TRUTH_COLOR = (0, 160, 220)  # blue: what is true is not taken for what was predicted
CURVE_SIZE_IN = (7.6, 3.0)
CURVE_DPI = 200
SMOOTHED_PART = 20  # losses are smoothed over a twentieth of the curve
AXIS_COLOR = "#808080"  # readable on the light and on the dark page
# Okabe and Ito's colours, told apart by the colour-blind too, without black and yellow.
CURVE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

METRICS_NOTE = (
    "In percent; higher is better; the best of each column is bold. "
    "mIoU is the mean over pairs (an image with one phrase) of the intersection over union of "
    "predicted and true foreground, at the best of 49 thresholds from 0.02 to 0.98. "
    "IoU FG counts the pixels of all pairs together, at its own best threshold, so large objects "
    "weigh more. AP is the area under the precision-recall curve of all pixels."
)
EXAMPLES_NOTE = (
    "The tint grows with the predicted probability; the outline runs where it passes 0.5, and the "
    "IoU below a prediction is that pair's at 0.5."
)
CURVES_NOTE = "Pale: the loss of each step. Strong: smoothed. Dots: the loss on validation pairs."

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #63636b; --line: #dcdce0;
  --page: #ffffff; --panel: #f6f6f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e8; --soft: #9c9ca6; --line: #38383e;
  --page: #17171a; --panel: #202024; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 28px; line-height: 1.25; font-weight: 600; margin: 0 0 8px; }
h2 { font-size: 18px; font-weight: 600; margin: 44px 0 12px; }
p { margin: 0 0 12px; max-width: 46em; overflow-wrap: anywhere; }
.summary { font-size: 18px; color: var(--soft); }
.note { font-size: 14px; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th { font-weight: 600; text-align: left; }
.results { margin-bottom: 14px; font-variant-numeric: tabular-nums; }
.results th, .results td { padding: 6px 22px 6px 0; vertical-align: baseline; }
.results thead th { border-bottom: 1px solid var(--ink); }
.results tbody { border-bottom: 1px solid var(--line); }
.results tbody th { font-weight: 400; min-width: 16em; max-width: 34em; overflow-wrap: anywhere; }
.results .number { text-align: right; padding-left: 18px; white-space: nowrap; }
.results .remark { color: var(--soft); font-size: 14px; margin-left: 8px; }
.results .baseline th, .results .baseline td { color: var(--soft); }
.results .group th { font-size: 13px; padding: 10px 0 0; }
.examples th { font-size: 14px; padding: 0 10px 6px 0; }
.examples td { padding: 0 10px 14px 0; vertical-align: top; font-size: 14px; }
.examples img { display: block; max-width: 168px; max-height: 168px; border-radius: 3px; }
.examples .phrase { width: 124px; max-height: 168px; overflow: auto; overflow-wrap: anywhere; }
.examples .score { color: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
.curves { display: block; width: 100%; max-width: 860px; height: auto; }
.legend { list-style: none; margin: 0 0 6px; padding: 0; font-size: 14px; }
.legend li { display: inline-block; margin-right: 20px; overflow-wrap: anywhere; }
.legend span { display: inline-block; width: 18px; height: 3px; margin-right: 7px;
  vertical-align: middle; }
.facts { width: 100%; background: var(--panel); border-radius: 6px; font-size: 14px; }
.facts th, .facts td { padding: 5px 16px; vertical-align: baseline; }
.facts tr:first-child > * { padding-top: 12px; }
.facts tr:last-child > * { padding-bottom: 12px; }
.facts th { font-weight: 400; color: var(--soft); width: 1%; min-width: 9em; }
.facts td { font: 13px/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.notes { padding-left: 20px; max-width: 46em; overflow-wrap: anywhere; }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="summary">{summary}</p>
{sections}
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class ResultRow:
    """The scores of one head, or of a trivial baseline to hold it against.

    ``mIoU``, ``IoU_FG`` and ``AP`` are in [0, 1], as ``evaluate`` gives them, or not finite where
    there is no score. ``note`` is a remark beside the name.

    Raises:
        ValueError: a finite score outside [0, 1].
    """

    name: str
    mIoU: float
    IoU_FG: float
    AP: float
    baseline: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        for score in (self.mIoU, self.IoU_FG, self.AP):
            if math.isfinite(score) and not 0 <= score <= 1:
                raise ValueError(
                    f"scores of {self.name!r} must be in [0, 1], but got {score}; "
                    "divide percentages by 100"
                )


@dataclass(frozen=True)
class Curve:
    """One head's training: a loss for each of ``steps``, and (step, loss) on validation pairs.

    Losses that are not finite leave a gap.

    Raises:
        ValueError: not one loss a step.
    """

    name: str
    steps: Sequence[int]
    losses: Sequence[float]
    validation: Sequence[tuple[int, float]] = ()

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.losses):
            raise ValueError(
                f"curve {self.name!r} must have one loss a step, but got "
                f"{len(self.steps)} steps and {len(self.losses)} losses"
            )


@dataclass(frozen=True, eq=False)
class Example:
    """One pair and what the heads made of it.

    ``image`` is (H, W, 3) uint8 RGB, ``truth`` (H, W) bool, ``predictions`` maps a head's name to
    its (H, W) float probabilities in [0, 1].

    Raises:
        ValueError: another shape, dtype or range.
    """

    image: np.ndarray
    phrase: str
    truth: np.ndarray
    predictions: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if self.truth.dtype != np.bool_:
            raise ValueError(f"truth of {self.phrase!r} must be bool, but got {self.truth.dtype}")
        overlay.check_image(self.image)
        for mask in (self.truth, *self.predictions.values()):
            overlay.check_mask(mask, self.image.shape[:2])


@dataclass(frozen=True, eq=False)
class Report:
    """What goes on the page, top to bottom; an empty part is left out.

    ``facts`` maps a label to its value: commands, times, versions, pairs, bytes.
    """

    title: str
    summary: str
    facts: Mapping[str, str]
    results: Sequence[ResultRow]
    curves: Sequence[Curve]
    examples: Sequence[Example]
    notes: Sequence[str]


def write_report(path: Path, report: Report) -> None:
    """Writes the page in one step: a reader finds the old page or the whole new one.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    page = render_report(report).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(page)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def render_report(report: Report) -> str:
    """The page as text that encodes to UTF-8."""
    sections: list[tuple[str, str]] = []
    if report.results:
        sections.append(("Results", _render_results(report.results)))
    if report.examples:
        sections.append(("Examples", _render_examples(report.examples)))
    if report.curves:
        sections.append(("Training", _render_curves(report.curves)))
    if report.facts:
        sections.append(("The run", _render_facts(report.facts)))
    if report.notes:
        notes = "\n".join(f"<li>{_escape(note)}</li>" for note in report.notes)
        sections.append(("Notes", f'<ul class="notes">\n{notes}\n</ul>'))
    return PAGE.format(
        title=_escape(report.title),
        summary=_escape(report.summary),
        style=STYLE,
        sections="\n".join(
            f"<section>\n<h2>{heading}</h2>\n{body}\n</section>" for heading, body in sections
        ),
    )


def _render_results(rows: Sequence[ResultRow]) -> str:
    bests = [
        _percent(max((score for score in scores if math.isfinite(score)), default=math.nan))
        for scores in zip(*map(_scores, rows), strict=True)
    ]
    names = "".join(f'<th class="number">{name}</th>' for name in ("mIoU", "IoU FG", "AP"))
    lines = [f"<thead><tr><th>Head</th>{names}</tr></thead>\n<tbody>"]
    lines += [_render_result(row, bests) for row in rows if not row.baseline]
    if any(row.baseline for row in rows):
        lines += ['</tbody>\n<tbody class="baseline">']
        lines += ['<tr class="group"><th colspan="4">Trivial baselines</th></tr>']
        lines += [_render_result(row, bests) for row in rows if row.baseline]
    return (
        f'<div class="scroll"><table class="results">\n{_join(lines)}\n</tbody>\n</table></div>\n'
        f'<p class="note">{METRICS_NOTE}</p>'
    )


def _render_result(row: ResultRow, bests: Sequence[str]) -> str:
    remark = f' <span class="remark">{_escape(row.note)}</span>' if row.note else ""
    cells = [f'<th scope="row"><bdi>{_escape(row.name)}</bdi>{remark}</th>']
    for text, best in zip(map(_percent, _scores(row)), bests, strict=True):
        # As good as the best to the digit shown is best: a hidden digit decides nothing.
        shown = f"<b>{text}</b>" if text == best != DASH else text
        cells.append(f'<td class="number">{shown}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _scores(row: ResultRow) -> tuple[float, float, float]:
    return row.mIoU, row.IoU_FG, row.AP


def _percent(score: float) -> str:
    return f"{100 * score:.1f}" if math.isfinite(score) else DASH


def _render_examples(examples: Sequence[Example]) -> str:
    heads = list(dict.fromkeys(name for example in examples for name in example.predictions))
    names = ["Image", "Phrase", "Truth", *heads]
    header = "".join(f"<th>{_escape(name)}</th>" for name in names)
    rows = [f"<tr>{''.join(_render_cells(example, heads))}</tr>" for example in examples]
    return (
        f'<p class="note">{EXAMPLES_NOTE}</p>\n<div class="scroll"><table class="examples">\n'
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n{_join(rows)}\n</tbody>\n</table></div>"
    )


def _render_cells(example: Example, heads: Sequence[str]) -> list[str]:
    image = overlay.resize_for_display(example.image, PICTURE_PX)
    cells = [
        f"<td>{_render_picture(image, 'image')}</td>",
        f'<td><div class="phrase">{_escape(example.phrase)}</div></td>',
        f"<td>{_render_picture(_draw(example, example.truth, TRUTH_COLOR), 'truth')}</td>",
    ]
    for head in heads:
        probability = example.predictions.get(head)
        if probability is None:
            cells.append(f"<td>{DASH}</td>")
            continue
        drawn = _draw(example, probability, overlay.TINT)
        score = _percent(_iou(example.truth, probability > overlay.THRESHOLD))
        picture = _render_picture(drawn, f"prediction of {head}")
        cells.append(f'<td>{picture}<div class="score">IoU {score}</div></td>')
    return cells


def _draw(example: Example, mask: np.ndarray, color: overlay.Color) -> np.ndarray:
    # Enlarged first, so that the outline is thin beside the pixels of a small scene.
    image, mask = (overlay.resize_for_display(array, PICTURE_PX) for array in (example.image, mask))
    return overlay.draw_overlay(image, mask, color=color)


def _iou(truth: np.ndarray, predicted: np.ndarray) -> float:
    union = np.count_nonzero(truth | predicted)
    return np.count_nonzero(truth & predicted) / union if union else math.nan


def _render_picture(picture: np.ndarray, alt: str) -> str:
    return f'<img alt="{_escape(alt)}" src="{overlay.encode_data_uri(picture)}">'


def _render_curves(curves: Sequence[Curve]) -> str:
    # The names are in HTML, not in the plot: they are hostile input to matplotlib's mathtext.
    legend = [
        f'<li><span style="background:{color}"></span>{_escape(curve.name)}</li>'
        for curve, color in zip(curves, itertools.cycle(CURVE_COLORS), strict=False)
    ]
    plot = base64.b64encode(_plot_curves(curves)).decode()
    return (
        f'<ul class="legend">\n{_join(legend)}\n</ul>\n'
        f'<img class="curves" alt="loss over optimizer steps" src="data:image/png;base64,{plot}">\n'
        f'<p class="note">{CURVES_NOTE}</p>'
    )


def _plot_curves(curves: Sequence[Curve]) -> bytes:
    """The losses over the steps as a PNG without a ground, for the light and the dark page."""
    figure = Figure(figsize=CURVE_SIZE_IN, dpi=CURVE_DPI, layout="constrained")
    axes = figure.add_subplot()
    highs = []
    for curve, color in zip(curves, itertools.cycle(CURVE_COLORS), strict=False):
        losses = np.asarray(curve.losses, dtype=np.float64)
        losses = np.where(np.isfinite(losses), losses, np.nan)
        smoothed = _smooth(losses)
        axes.plot(curve.steps, losses, color=color, alpha=0.25, linewidth=0.7)
        axes.plot(curve.steps, smoothed, color=color, linewidth=1.6)
        points = np.array([point for point in curve.validation if math.isfinite(point[1])])
        points = points.reshape(-1, 2)
        axes.plot(*points.T, color=color, marker="o", markersize=3.5, linewidth=0.8, linestyle=":")
        highs += [*smoothed[~np.isnan(smoothed)], *points[:, 1]]
    if highs and max(highs) > 0:
        axes.set_ylim(0, 1.2 * max(highs))  # single spikes are cut: they would flatten the rest
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(AXIS_COLOR)
    axes.tick_params(colors=AXIS_COLOR, labelsize=8)
    axes.set_xlabel("step", color=AXIS_COLOR, fontsize=9)
    axes.set_ylabel("loss", color=AXIS_COLOR, fontsize=9)
    axes.grid(axis="y", color=AXIS_COLOR, alpha=0.2, linewidth=0.6)
    file = io.BytesIO()
    figure.savefig(file, format="png", transparent=True, metadata={"Software": None})
    return file.getvalue()


def _smooth(losses: np.ndarray) -> np.ndarray:
    """Centred mean of the finite losses, weighted by a bell over a twentieth of the curve."""
    if losses.size == 0:
        return losses
    # Odd, without its zeros at the ends, and at most as long as the curve.
    window = np.hanning(2 * (losses.size // SMOOTHED_PART // 2) + 3)[1:-1]
    counts = np.convolve(~np.isnan(losses), window, mode="same")
    sums = np.convolve(np.nan_to_num(losses), window, mode="same")
    return np.divide(sums, counts, out=np.full_like(losses, np.nan), where=counts > 1e-6)


def _render_facts(facts: Mapping[str, str]) -> str:
    rows = [
        f'<tr><th scope="row">{_escape(label)}</th><td>{_escape(value)}</td></tr>'
        for label, value in facts.items()
    ]
    return f'<table class="facts">\n{_join(rows)}\n</table>'


def _join(lines: Sequence[str]) -> str:
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Text for HTML, in an attribute too; control characters and lone surrogates are replaced."""
    clean = "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs") else "\ufffd"
        for char in text
    )
    return html.escape(clean)
