"""One trial of a sweep, without Ray: fit a head from where it stands, and write down its figures.

``OUT/trials/<id>`` is a training run's folder. ``result.json`` in it, written whole and last, is
what makes a trial finished; ``failed.json`` says why one ended otherwise, until it is tried again.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.metrics import Scores
from pipeline.baselines import MeanMasks, predict_foreground
from pipeline.checkpoint import find_checkpoint, list_checkpoints, read_record
from pipeline.evaluate import count_pairs, count_threads
from pipeline.reader import PairReader
from pipeline.score_pairs import ROWS, choose_pairs
from pipeline.sweep_plan import SweepPlan, Trial
from pipeline.task_sample import sample_tasks
from pipeline.train import Worker, fit
from pipeline.train_log import METRICS
from pipeline.whole_file import write_whole

logger = logging.getLogger(__name__)

RESULT = "result.json"
FAILED = "failed.json"
BASELINE_BATCH = 32  # pairs
METRIC_NAMES = ("mIoU", "IoU_FG", "AP")
_LONG = 4000  # characters of a reason


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a trial: a row of figures by the name of what was scored, or a reason."""

    trial: str
    rows: dict[str, dict[str, float]]
    run: dict[str, Any]  # seconds, speed and where the checkpoint is
    error: str | None = None


def run_trial(plan: SweepPlan, trial: Trial) -> Outcome:
    """Run a trial to its end, from its last checkpoint if it has one; never raises for its faults.

    What a finished trial left is returned as it is.
    """
    folder = plan.folder(trial)
    finished = read_outcome(folder)
    if finished is not None and finished.error is None:
        return finished
    start_s = time.monotonic()
    try:
        rows, run = (_score_baselines if trial.is_baselines else _fit_head)(plan, trial)
    except Exception as error:  # recorded with its reason; the others go on
        logger.info("trial %s failed", trial.id, exc_info=True)
        return write_failure(plan, trial, f"{type(error).__name__}: {error}")
    run |= {"seconds": time.monotonic() - start_s, "snapshot": plan.snapshot.digest}
    plain = {"rows": rows, "run": run}
    write_whole(folder / RESULT, json.dumps(plain, indent=1) + "\n")
    (folder / FAILED).unlink(missing_ok=True)
    return Outcome(trial.id, rows, run)


def write_failure(plan: SweepPlan, trial: Trial, reason: str) -> Outcome:
    """Write down why a trial ended without a result."""
    reason = reason[:_LONG]
    write_whole(plan.folder(trial) / FAILED, json.dumps({"error": reason}, indent=1) + "\n")
    return Outcome(trial.id, {}, {}, reason)


def read_outcome(folder: Path) -> Outcome | None:
    """Return what became of the trial of a folder, None where it has not ended."""
    for name in (RESULT, FAILED):
        try:
            plain = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        error = plain.get("error")
        return Outcome(folder.name, plain.get("rows", {}), plain.get("run", {}), error)
    return None


def _fit_head(plan: SweepPlan, trial: Trial) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    folder, config = plan.folder(trial), trial.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = plan.open_source(trial)
    fit(config, source, folder, Worker(0, 1, device), resume=bool(list_checkpoints(folder)))
    checkpoint = find_checkpoint(folder)
    record = read_record(checkpoint)
    # The figures of the last step's validation: those that `ldznet evaluate` finds again.
    figures = {name: record.validation[name] for name in METRIC_NAMES}
    run = {
        "steps": record.step,
        "checkpoint": str(checkpoint.relative_to(plan.out)),
        **_read_speed(folder / METRICS),
    }
    return {config.head.name: figures}, run


def _read_speed(path: Path) -> dict[str, float]:
    """Return pairs a second and the share of time that waited for data, over the whole run."""
    elapsed_s = waited_s = pairs = 0.0
    before = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        record: Mapping[str, Any] = json.loads(line)
        if "loss" not in record:
            continue
        steps, before = record["step"] - before, record["step"]
        part_s = steps / max(record["pairs_per_s"], 1e-9)  # times the batch, as are the pairs
        elapsed_s += part_s
        waited_s += part_s * record["data_wait"]
        pairs += steps
    if not elapsed_s:
        return {}
    return {"pairs_per_s": pairs / elapsed_s, "data_wait": waited_s / elapsed_s}


def _score_baselines(
    plan: SweepPlan, trial: Trial
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    source, data = plan.open_source(trial), trial.config.data
    nothing: frozenset[str] = frozenset()
    train = PairReader(source, tasks=data.train, inputs=nothing, choice=data.train_filter)
    reader = PairReader(
        source, tasks=data.validation, inputs=nothing, choice=data.validation_filter
    )
    counted = count_pairs(
        [predict_foreground, MeanMasks(sample_tasks(source, train, choice=data.train_filter))],
        reader,
        choose_pairs(len(reader), trial.config.validation_pairs),
        batch=BASELINE_BATCH,
        draw=0,
        num_threads=count_threads(torch.device("cpu")),
    )
    rows = {
        name: _list_figures(metrics.compute()) for name, metrics in zip(ROWS, counted, strict=True)
    }
    return rows, {}


def _list_figures(scores: Scores) -> dict[str, float]:
    return {name: float(getattr(scores, name)) for name in METRIC_NAMES}
