"""A report of a run: one HTML file that opens without a network.

Each part has its rows and their HTML in one file: ``report_tables`` scores, effects and facts,
``report_pictures`` examples and pictures, ``report_curves`` the losses. ``report_style`` is the
page around them. Pictures are inlined, the style sheet is in the page, there are no scripts, and a
content security policy forbids all else. Every text is escaped: phrases come from a corpus, so
anybody wrote them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.base.whole_file import write_whole
from pipeline.report.curves import Curve, render_curves
from pipeline.report.pictures import Example, Picture, render_examples, render_picture
from pipeline.report.style import PAGE, STYLE
from pipeline.report.tables import (
    EffectRow,
    ResultRow,
    render_effects,
    render_facts,
    render_results,
)
from pipeline.report.text import escape, join_lines


@dataclass(frozen=True, eq=False)
class Report:
    """What goes on the page; an empty part is left out.

    ``facts`` maps a label to its value: commands, times, versions, pairs, bytes; ``savings`` does
    so for what caching saved. ``results_note`` stands below the results, above what the metrics
    are, and says e.g. what the groups are.
    """

    title: str
    summary: str
    facts: Mapping[str, str]
    results: Sequence[ResultRow]
    curves: Sequence[Curve]
    examples: Sequence[Example]
    notes: Sequence[str]
    effects: Sequence[EffectRow] = ()
    pictures: Sequence[Picture] = ()
    savings: Mapping[str, str] = field(default_factory=dict)
    results_note: str = ""


def write_report(path: Path, report: Report) -> None:
    """Writes the page in one step: a reader finds the old page or the whole new one.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    write_whole(path, render_report(report))


def render_report(report: Report) -> str:
    """The page as text that encodes to UTF-8."""
    sections = [
        f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>"
        for heading, body in _render_sections(report)
    ]
    return PAGE.format(
        title=escape(report.title),
        summary=escape(report.summary),
        style=STYLE,
        sections=join_lines(sections),
    )


def _render_sections(report: Report) -> Iterator[tuple[str, str]]:
    """Headings, not escaped yet, and bodies, from top to bottom."""
    if report.results:
        yield "Results", render_results(report.results, report.results_note)
    if report.effects:
        yield "The paper's effects", render_effects(report.effects)
    for picture in report.pictures:
        yield picture.title, render_picture(picture)
    if report.examples:
        yield "Examples", render_examples(report.examples)
    if report.curves:
        yield "Training", render_curves(report.curves)
    if report.savings:
        yield "What caching saved", render_facts(report.savings)
    if report.facts:
        yield "The run", render_facts(report.facts)
    if report.notes:
        notes = [f"<li>{escape(note)}</li>" for note in report.notes]
        yield "Notes", f'<ul class="notes">\n{join_lines(notes)}\n</ul>'
