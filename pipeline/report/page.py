"""A report of a run: one HTML file that opens without a network.

``templates/page.html.j2`` is the page. Pictures and the style sheet are inlined, there are no
scripts, and a content security policy forbids everything else. Phrases come from a corpus, so
anybody may have written them: jinja2 escapes every text.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from pipeline.base.whole_file import write_whole
from pipeline.report.curves import CURVE_COLORS, Curve, plot_curves
from pipeline.report.pictures import Example, Picture
from pipeline.report.tables import (
    METRICS,
    EffectRow,
    ResultRow,
    format_percent,
    format_points,
    group_results,
)

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, eq=False)
class Report:
    """What goes on the page; a section that is empty is left out.

    ``facts`` maps a label to its value: commands, times, versions, bytes; ``savings`` does so for
    what caching saved. ``results_note`` is shown below the results. All examples have predictions
    of the same heads.
    """

    title: str
    summary: str
    facts: Mapping[str, str] = field(default_factory=dict)
    results: Sequence[ResultRow] = ()
    results_note: str = ""
    effects: Sequence[EffectRow] = ()
    pictures: Sequence[Picture] = ()
    examples: Sequence[Example] = ()
    curves: Sequence[Curve] = ()
    savings: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def write_report(path: Path, report: Report) -> None:
    """Write the page in one step: a reader finds the old page or the whole new one.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    write_whole(path, render_report(report))


def render_report(report: Report) -> str:
    """Return the page as text that encodes to UTF-8."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_replace_controls,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "base64": _encode_base64,
        "percent": format_percent,
        "points": format_points,
    }
    return environment.get_template("page.html.j2").render(
        report=report,
        metrics=METRICS,
        groups=group_results(report.results),
        plot=plot_curves(report.curves) if report.curves else None,
        colors=CURVE_COLORS,
    )


def _encode_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _replace_controls(value: object) -> object:
    """Replace control characters and lone surrogates, which HTML cannot hold, in a text."""
    return _CONTROLS.sub("\ufffd", value) if type(value) is str else value
