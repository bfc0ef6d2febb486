"""A forecast beside what a run after it really stored, and how long that took."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.base.yaml import SpecError
from pipeline.plan.estimate import Estimate
from pipeline.plan.files import add_files
from pipeline.plan.forecast import Forecast
from pipeline.plan.report import round_figure
from pipeline.report.markdown import format_table
from pipeline.store.store import Store

BYTES_WITHIN, TIME_WITHIN = 0.20, 0.30
"""How near a forecast is meant to be."""
ROUNDING = 1e-3


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of a forecast beside what a run gave; ``ratio`` is forecast over real."""

    what: str
    forecast: float
    real: float
    ratio: float | None
    in_range: bool
    within: float | None  # how near it is meant to be


def compare(forecast: Forecast, store_url: str, metrics: Path | None) -> list[Comparison]:
    """Hold a forecast against what a store holds of its layers and what a run took.

    Args:
        metrics: the ``metrics.jsonl`` of the run, or of several that together did it.

    Raises:
        SpecError: the store has not the forecast's layers, or the file has no encode run.
        DamagedStoreError: a commit record cannot be read.
    """
    store = Store.open(store_url)
    rows: Counter[str] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    num_tasks = 0
    for kind in ("latents", "features"):
        if kind not in forecast.facts:
            continue
        folder = str(forecast.facts[kind])
        store.read_layer(folder)  # an error where there is none
        for commit in store.read_commits(folder):
            sizes.update({(folder, name): n for name, n in add_files(commit).items()})
            if kind == "latents":
                num_tasks += 1
                rows.update(commit.rows)
                rows["stored"] += commit.accounting.stored_samples if commit.accounting else 0
    found = [_compare("tasks", _exactly(float(forecast.facts["tasks"])), num_tasks)]
    found += [
        _compare(name, forecast.counts[name], rows[name])
        for name in ("stored", "views", "pairs", "prompts")
    ]
    found += [
        _compare(f"bytes of {kind} {f.name}", f.num_bytes, sizes[f.layer, f.name])
        for kind in ("latents", "features")
        for f in forecast.files
        if forecast.facts.get(kind) == f.layer
    ]
    found.append(_compare("bytes", forecast.num_bytes, sizes.total(), within=BYTES_WITHIN))
    if metrics is not None:
        wall_s = add_runs(metrics)
        found.append(_compare("seconds", forecast.times["wall_s"], wall_s, within=TIME_WITHIN))
    return found


def _exactly(value: float) -> Estimate:
    return Estimate(value, value, value)


def _compare(what: str, found: Estimate, real: float, *, within: float | None = None) -> Comparison:
    ratio = found.value / real if real else None
    # Counts are whole, forecasts are not; and longer numbers make an array's metadata longer.
    slack = max(0.5, ROUNDING * real)
    in_range = found.low - slack <= real <= found.high + slack
    return Comparison(what, found.value, real, ratio, in_range, within)


def add_runs(metrics: Path) -> float:
    """Return the seconds of all encode runs that a ``metrics.jsonl`` holds.

    Raises:
        SpecError: it cannot be read, or holds none.
    """
    last: list[float] = []
    for record in _read_records(metrics):
        if record.get("verb") != "encode":
            continue
        elapsed_s = float(str(record["elapsed_s"]))
        if last and elapsed_s >= last[-1]:
            last[-1] = elapsed_s
        else:  # the clock of a run starts at 0
            last.append(elapsed_s)
    if not last:
        raise SpecError(f"{metrics}: expected the records of an encode run, found none")
    return sum(last)


def _read_records(path: Path) -> Iterator[dict[str, object]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SpecError(f"{path}: line {number} is not JSON: {error}") from error
        if isinstance(record, dict):
            yield record


def format_comparison(rows: list[Comparison]) -> str:
    """Return a comparison as a table, and whether it is as near as it is meant to be."""
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
            near = abs(row.ratio - 1) <= row.within
            verdict = "within" if near else "not within"
            lines.append(f"{row.what}: {row.ratio - 1:+.1%}, {verdict} {row.within:.0%}")
    return "\n".join(lines)
