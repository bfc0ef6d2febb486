"""One trial of a sweep, without Ray: fit a head from where it stands, and write down its figures.

``OUT/trials/<id>`` is a training run's folder. ``result.json`` in it, written whole and last, is
what makes a trial finished; ``failed.json`` says why one ended otherwise, until it is tried again.
Each of the sweep's tests adds a ``test-<digest>.json``: one that is new scores the head that is
there, and trains nothing.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.base.whole_file import write_whole
from pipeline.evaluate.baselines import BASELINES
from pipeline.evaluate.pair_scorer import PairScorer, ScoringJob
from pipeline.evaluate.scoring import BATCH_SIZE, METRIC_NAMES, list_figures
from pipeline.runs.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint, read_record
from pipeline.sweep.config import TestSplit
from pipeline.sweep.trials import SweepPlan, Trial
from pipeline.train.fit import Worker, fit
from pipeline.train.log import METRICS

logger = logging.getLogger(__name__)

RESULT = "result.json"
FAILED = "failed.json"
_LONG = 4000  # characters of a reason
_TEST_DIGITS = 12
Figures = dict[str, dict[str, float]]  # metrics in [0, 1] by the name of what was scored


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a trial: a row of figures by the name of what was scored, or a reason."""

    trial: str
    rows: Figures  # on the validation pairs
    run: dict[str, Any]  # seconds, speed and where the checkpoint is
    error: str | None = None  # of its last try; what an earlier one found stays
    tests: dict[str, Figures] = field(default_factory=dict)  # by the test's name
    pending: bool = False  # fitted, but not scored on every test

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.error is None and not self.pending


def run_trial(plan: SweepPlan, trial: Trial) -> Outcome:
    """Run a trial to its end, from its last checkpoint if it has one; never raises for its faults.

    What a finished trial left is returned as it is; of the tests, those that are new are scored.
    """
    folder = plan.folder(trial)
    try:
        if not (folder / RESULT).exists():
            _fit_trial(plan, trial)
        for test in plan.config.tests.values():
            if not (folder / _name_test(test)).exists():
                _score_test(plan, trial, test)
    except Exception as error:  # recorded with its reason; the others go on
        logger.info("trial %s failed", trial.id, exc_info=True)
        return write_failure(plan, trial, f"{type(error).__name__}: {error}")
    (folder / FAILED).unlink(missing_ok=True)
    outcome = read_outcome(plan, trial)
    assert outcome is not None
    return outcome


def write_failure(plan: SweepPlan, trial: Trial, reason: str) -> Outcome:
    """Write down why a trial ended without all its figures."""
    plain = {"error": reason[:_LONG]}
    write_whole(plan.folder(trial) / FAILED, json.dumps(plain, indent=1) + "\n")
    outcome = read_outcome(plan, trial)
    assert outcome is not None
    return outcome


def read_outcome(plan: SweepPlan, trial: Trial) -> Outcome | None:
    """Return what became of a trial; None where it has not ended."""
    folder = plan.folder(trial)
    failed, result = _read_json(folder / FAILED), _read_json(folder / RESULT)
    if result is None and failed is None:
        return None
    error = failed["error"] if failed else None
    if result is None:
        return Outcome(trial.id, {}, {}, error)
    tests = {
        name: figures
        for name, test in plan.config.tests.items()
        if (figures := _read_json(folder / _name_test(test))) is not None
    }
    pending = len(tests) < len(plan.config.tests)
    # What a failure left goes with the try that mends it, unless that was killed in between.
    error = error if pending else None
    return Outcome(trial.id, result["rows"], result["run"], error, tests, pending)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _fit_trial(plan: SweepPlan, trial: Trial) -> None:
    start_s = time.monotonic()
    rows, run = (_score_baselines if trial.is_baselines else _fit_head)(plan, trial)
    run |= {"seconds": time.monotonic() - start_s, "snapshot": plan.snapshot.digest}
    plain = {"rows": rows, "run": run}
    write_whole(plan.folder(trial) / RESULT, json.dumps(plain, indent=1) + "\n")


def _fit_head(plan: SweepPlan, trial: Trial) -> tuple[Figures, dict[str, Any]]:
    folder, config = plan.folder(trial), trial.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = plan.open_source(trial)
    fit(config, source, folder, Worker(0, 1, device), resume=bool(list_checkpoints(folder)))
    checkpoint = find_checkpoint(folder)
    record = read_record(checkpoint)
    # The figures of the last step's validation: those that `ldznet evaluate` finds again.
    figures = {name: record.validation[name] for name in METRIC_NAMES}
    figures["num_pairs"] = trial.num_pairs
    run = {
        "steps": record.step,
        "checkpoint": str(checkpoint.relative_to(plan.out)),
        **_read_speed(folder / METRICS),
    }
    return {config.head.name: figures}, run


def _name_test(test: TestSplit) -> str:
    """The file of a test's figures, named by what it holds: not by what the table calls it."""
    plain = json.dumps(test.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return f"test-{hashlib.sha256(plain.encode()).hexdigest()[:_TEST_DIGITS]}.json"


def _score_test(plan: SweepPlan, trial: Trial, test: TestSplit) -> None:
    rows = _score(plan, trial, test)
    write_whole(plan.folder(trial) / _name_test(test), json.dumps(rows, indent=1) + "\n")


def _score(plan: SweepPlan, trial: Trial, test: TestSplit) -> Figures:
    """Score the head of a trial's last checkpoint, or the baselines, on a test's pairs."""
    head = None if trial.is_baselines else load_checkpoint(plan.folder(trial))[0]
    job = ScoringJob(
        source=plan.open_source(trial),
        data=trial.config.data,
        tasks=test.tasks,
        choice=test.filter,
        batch_size=BATCH_SIZE,
        limit=test.limit,
    )
    counted = PairScorer(job, head, baselines=head is None).count(None)
    names = BASELINES if head is None else (trial.config.head.name,)
    return {
        name: list_figures(metrics.compute()) for name, metrics in zip(names, counted, strict=True)
    }


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


def _score_baselines(plan: SweepPlan, trial: Trial) -> tuple[Figures, dict[str, Any]]:
    config = trial.config
    validation = TestSplit(
        tasks=config.data.validation,
        filter=config.data.validation_filter,
        limit=config.validation_pairs,
    )
    return _score(plan, trial, validation), {}
