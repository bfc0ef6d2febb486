"""The results of a sweep: ``results.parquet``, a row a trial, and ``results.md``, a row a setting.

Both are written again as trials end. A setting is what trials that differ only in their seed have
in common; its row has the mean and the sample standard deviation over the seeds that have ended.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.base.whole_file import open_whole, write_whole
from pipeline.evaluate.scoring import FIGURE_NAMES, METRIC_NAMES
from pipeline.report.markdown import format_table
from pipeline.sweep.config import BASELINE_VARIANT, VALIDATION
from pipeline.sweep.trial import TrialResult
from pipeline.sweep.trials import SweepPlan, Trial

PARQUET, MARKDOWN = "results.parquet", "results.md"
_INTS = pa.list_(pa.int32())
_THRESHOLD = "mIoU_threshold"
_MAX_NAMED = 4  # trials that failed for one reason
_OPTIONS = ("fusion",)  # of heads, that have a column of their own
SCHEMA = pa.schema(
    [
        ("trial", pa.string()),  # its folder under trials/
        ("status", pa.string()),  # done or failed
        ("variant", pa.string()),
        ("head", pa.string()),  # or what a baseline is called
        ("initialise", pa.string()),
        ("fusion", pa.string()),
        ("options", pa.string()),  # the head's others, such as "width 32, grid none"
        ("blocks", _INTS),  # null where the head reads no features
        ("features", pa.string()),  # the layer's name on its axis, or its folder
        ("draws", _INTS),  # null: all
        ("timesteps", _INTS),  # of the draws; null where the layer draws them at random
        ("learning_rate", pa.float64()),
        ("num_steps", pa.int64()),
        ("seed", pa.int64()),
        ("scored_on", pa.string()),  # validation, or a test's name
        *((name, pa.float64()) for name in FIGURE_NAMES),  # in [0, 1]
        ("num_pairs", pa.int64()),  # that its figures are of
        ("steps", pa.int64()),
        ("seconds", pa.float64()),  # of the run that finished it, start and validation included
        ("pairs_per_s", pa.float64()),
        ("data_wait", pa.float64()),  # share of the time spent waiting for batches
        ("checkpoint", pa.string()),  # below the sweep's --out
        ("snapshot", pa.string()),
        ("latents_layer", pa.string()),
        ("features_layer", pa.string()),
        ("error", pa.string()),
    ]
)
SETTINGS = (
    *("variant", "head", "initialise", "fusion", "options", "blocks", "features", "draws"),
    *("learning_rate", "num_steps", "scored_on"),
)
Row = dict[str, Any]


def list_rows(plan: SweepPlan, results: Mapping[str, TrialResult]) -> list[Row]:
    """Return rows of ``SCHEMA`` of the trials that have ended, in the plan's order."""
    rows: list[Row] = []
    for trial in plan.trials:
        if (result := results.get(trial.id)) is None:
            continue
        empty: Row = dict.fromkeys(SCHEMA.names)
        common = empty | _describe(plan, trial) | result.run
        if result.error is not None:
            rows.append(common | {"status": "failed", "error": result.error})
        for split, scored in {VALIDATION: result.rows, **result.tests}.items():
            for name, figures in scored.items():
                done = {"status": "done", "head": name, "scored_on": split}
                rows.append(common | done | figures)
    return rows


def _describe(plan: SweepPlan, trial: Trial) -> Row:
    config = trial.config
    data = config.data
    row: Row = {
        "trial": trial.id,
        "variant": trial.variant,
        "num_pairs": trial.num_pairs,
        "latents_layer": data.latents,
        "head": trial.variant,
    }
    if trial.is_baselines:
        return row
    row |= {
        "head": config.head.name,
        "learning_rate": config.learning_rate,
        "num_steps": config.num_steps,
        "seed": config.seed,
    }
    options = config.head.options
    if options.starts_from_ldm:
        row["initialise"] = "checkpoint" if config.head.from_ else config.head.initialise
    row |= {name: getattr(options, name, None) for name in _OPTIONS}
    row["options"] = options.describe(without=_OPTIONS)
    if trial.reads_features:
        row |= {
            "blocks": list(config.head.blocks),
            "features": trial.features or data.features,
            "features_layer": data.features,
            "draws": None if data.draws is None else list(data.draws),
            "timesteps": plan.list_timesteps(trial),
        }
    return row


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the seeds of a setting, in [0, 1]."""

    mean: float
    deviation: float | None  # sample standard deviation; None of one seed
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of one value or more."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    def format(self) -> str:
        """Return it in percent, such as ``52.7 ± 0.3``."""
        text = f"{100 * self.mean:.1f}"
        return text if self.deviation is None else f"{text} ± {100 * self.deviation:.1f}"


def group_rows(rows: Iterable[Row]) -> list[tuple[Row, dict[str, Spread]]]:
    """Return the first row of each setting, and the spread of each figure over its seeds.

    Rows of baselines and of failed trials are left out.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == "done" and row["seed"] is not None:
            key = tuple(_hashable(row[name]) for name in (*SETTINGS, "features_layer"))
            groups.setdefault(key, []).append(row)
    return [
        (group[0], {name: Spread.of([row[name] for row in group]) for name in FIGURE_NAMES})
        for group in groups.values()
    ]


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def write_results(plan: SweepPlan, results: Mapping[str, TrialResult]) -> list[Row]:
    """Write both files under the sweep's --out; return the rows."""
    rows = list_rows(plan, results)
    with open_whole(plan.out / PARQUET) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    write_whole(plan.out / MARKDOWN, format_results(plan, rows))
    return rows


def format_results(plan: SweepPlan, rows: Sequence[Row]) -> str:
    """Return ``results.md``: the fields in which settings differ, and the metrics in percent."""
    groups = group_rows(rows)
    found = {name: {_hashable(row[name]) for row, _ in groups} - {None} for name in SETTINGS}
    shown = [name for name in SETTINGS if len(found[name]) > 1]
    if shown in ([], ["scored_on"]):
        shown = ["head", *shown]
    lines: list[dict[str, object]] = [
        {name: _format_setting(name, row) for name in shown}
        | {name: spreads[name].format() for name in METRIC_NAMES}
        | {"threshold": f"{spreads[_THRESHOLD].mean:.2f}", "seeds": spreads[_THRESHOLD].num}
        for row, spreads in groups
    ]
    for row in rows:
        if row["status"] == "done" and row["seed"] is None:
            line = {name: row[name] if name == "scored_on" else "" for name in shown}
            line[shown[0]] = row["head"]
            line |= {name: f"{100 * row[name]:.1f}" for name in METRIC_NAMES}
            lines.append(line | {"threshold": f"{row[_THRESHOLD]:.2f}", "seeds": None})
    failed = {row["trial"]: row["error"] for row in rows if row["status"] == "failed"}
    parts = [f"# {plan.config.title or 'Sweep'}", _format_note(plan, rows, len(failed))]
    if lines:
        parts.append(format_table(lines))
    if failed:
        parts.append(
            "Failed, and tried again by the next run:\n\n"
            + "\n".join(f"- {line}" for line in format_failures(plan, failed))
        )
    return "\n\n".join(parts) + "\n"


def format_failures(plan: SweepPlan, errors: Mapping[str, str]) -> list[str]:
    """Return a line for each reason, of the trials' errors by id: whose it is, as the axes say."""
    empty: Row = dict.fromkeys(SCHEMA.names)
    rows = {t.id: empty | _describe(plan, t) for t in plan.trials if not t.is_baselines}
    differ = [
        name
        for name in (*SETTINGS[:-1], "seed")
        if len({_hashable(row[name]) for row in rows.values()} - {None}) > 1
    ]
    reasons: dict[str, list[str]] = {}
    for trial, error in errors.items():
        reasons.setdefault(error.partition("\n")[0], []).append(trial)
    lines = []
    for reason, trials in reasons.items():
        names = [_name_trial(rows.get(trial), differ) for trial in trials[:_MAX_NAMED]]
        who = "; ".join(names) + (
            f"; and {more} more" if (more := len(trials) - len(names)) else ""
        )
        if 1 < len(rows) == sum(trial in rows for trial in trials):
            who = f"all {len(rows)} heads"
        lines.append(f"{who}: {reason} (trials/{trials[0]}{', …' if len(trials) > 1 else ''})")
    return lines


def _name_trial(row: Row | None, differ: Sequence[str]) -> str:
    if row is None:
        return BASELINE_VARIANT
    values = {name: _format_setting(name, row).replace(", ", "+") for name in differ}
    return ", ".join(f"{name} {x}" for name, x in values.items() if x) or str(row["head"])


def _format_note(plan: SweepPlan, rows: Sequence[Row], num_failed: int) -> str:
    done = len({row["trial"] for row in rows}) - num_failed
    failed = f", {num_failed} failed" if num_failed else ""
    return (
        f"In percent: mean ± sample standard deviation over seeds, on up to {plan.num_pairs} "
        "validation pairs after the last step. The threshold is the mean of mIoU's best; AP is the "
        f"average precision. {done} of {len(plan.trials)} trials are done{failed}. Snapshot "
        f"{plan.snapshot.digest} of {plan.store_url}. A row a trial, also with AP_clipseg, which "
        f"compares with the paper's AP: {PARQUET}."
    )


def _format_setting(name: str, row: Row) -> str:
    value = row[name]
    if name == "draws" and value is not None and row["timesteps"] is not None:
        return "t = " + ", ".join(map(str, row["timesteps"]))
    if value is None:
        return "all" if name == "draws" and row["blocks"] is not None else ""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
