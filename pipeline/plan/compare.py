"""A forecast compared with what a run after it stored, and with how long that took."""

import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.base.yaml import SpecError
from pipeline.plan.estimate import Estimate
from pipeline.plan.files import Committed
from pipeline.plan.forecast import Forecast
from pipeline.plan.report import round_figure
from pipeline.report.markdown import format_table
from pipeline.store.store import Store

BYTES_WITHIN, TIME_WITHIN = 0.20, 0.30
"""How near to the real figure a forecast should be."""
ROUNDING = 1e-3


@dataclass(frozen=True, slots=True)
class ComparedFigure:
    """One figure of a forecast and of a run; ``ratio`` is the forecast over the real figure."""

    what: str
    forecast: float
    real: float
    ratio: float | None
    in_range: bool
    within: float | None  # how near it should be


def compare(forecast: Forecast, store_url: str, metrics: Path | None) -> list[ComparedFigure]:
    """Compare a forecast with what a store holds of its layers and with the time of a run.

    Args:
        metrics: the ``metrics.jsonl`` of the run, or of several runs that together encoded it.

    Raises:
        SpecError: the store does not have the forecast's layers, or the file has no encode run.
        DamagedStoreError: a commit record cannot be read.
    """
    store, real = Store.open(store_url), Committed()
    num_tasks = 0
    for kind in ("latents", "features"):
        if kind in forecast.facts:
            layer = store.read_layer(str(forecast.facts[kind]))
            for commit in store.read_commits(layer.folder):
                real.add(layer, commit)
                num_tasks += kind == "latents"
    found = [_compare("tasks", Estimate.exact(float(forecast.facts["tasks"])), num_tasks)]
    found += [
        _compare(name, forecast.counts[name], real.rows[name])
        for name in ("stored", "set_aside", "views", "pairs", "masks", "prompts")
        if name in forecast.counts  # an earlier ldznet's has fewer
    ]
    for kind in ("latents", "features"):
        for file in forecast.files:
            if forecast.facts.get(kind) == file.layer:
                size = sum(num_bytes for _, num_bytes in real.files[file.layer, file.name])
                found.append(_compare(f"bytes of {kind} {file.name}", file.num_bytes, size))
    found.append(_compare("bytes", forecast.num_bytes, real.rows["bytes"], within=BYTES_WITHIN))
    if metrics is not None:
        wall_s = add_runs(metrics)
        found.append(_compare("seconds", forecast.times["wall_s"], wall_s, within=TIME_WITHIN))
    return found


def _compare(
    what: str, found: Estimate, real: float, *, within: float | None = None
) -> ComparedFigure:
    ratio = found.value / real if real else None
    # Counts are whole, forecasts are not; and longer numbers make an array's metadata longer.
    slack = max(0.5, ROUNDING * real)
    in_range = found.low - slack <= real <= found.high + slack
    return ComparedFigure(what, found.value, real, ratio, in_range, within)


def add_runs(metrics: Path) -> float:
    """Return the seconds of all encode runs in a ``metrics.jsonl``; SpecError where it has none."""
    try:
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise SpecError(f"{metrics}: cannot be read as lines of JSON: {error}") from error
    last: list[float] = []
    for record in records:
        if not isinstance(record, dict) or record.get("verb") != "encode":
            continue
        if last and record["elapsed_s"] >= last[-1]:
            last[-1] = record["elapsed_s"]
        else:  # another run, whose seconds start at 0
            last.append(record["elapsed_s"])
    if not last:
        raise SpecError(f"{metrics}: expected the records of an encode run, found none")
    return sum(last)


def format_comparison(rows: list[ComparedFigure]) -> str:
    """Return the figures as a table, and whether bytes and seconds are near enough."""
    table = [
        {
            "what": row.what,
            "forecast": round_figure(row.forecast),
            "real": round_figure(row.real),
            "ratio": row.ratio,
            "in range": row.in_range,
        }
        for row in rows
    ]
    lines = [format_table(table), ""]
    for row in rows:
        if row.within is not None and row.ratio is not None:
            verdict = "within" if abs(row.ratio - 1) <= row.within else "not within"
            lines.append(f"{row.what}: {row.ratio - 1:+.1%}, {verdict} {row.within:.0%}")
    return "\n".join(lines)
