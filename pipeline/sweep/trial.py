"""One trial of a sweep, without Ray: train its head, or resume it, and write its figures.

``OUT/trials/<id>`` is the folder of a training run. A trial is finished when ``result.json`` is in
it, which is written last; ``failed.json`` tells why one failed, until a later run succeeds. Each of
the sweep's tests adds a ``test-<digest>.json``; a new test scores the trained head again, and so
does a file of before, whose AP was what is AP_clipseg now.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.base.machine import choose_device
from pipeline.base.whole_file import write_json
from pipeline.evaluate.baselines import BASELINES
from pipeline.evaluate.pair_scorer import PairScorer, ScoringJob
from pipeline.evaluate.scoring import BATCH_SIZE, FIGURE_NAMES
from pipeline.runs.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint, read_record
from pipeline.sweep.config import TestSplit
from pipeline.sweep.trials import SweepPlan, Trial
from pipeline.train.data import Worker
from pipeline.train.fit import fit
from pipeline.train.log import METRICS

logger = logging.getLogger(__name__)

RESULT = "result.json"
FAILED = "failed.json"
_MAX_REASON = 4000  # characters
_TEST_DIGITS = 12
Figures = dict[str, dict[str, float]]  # metrics in [0, 1] by the name of the head or baseline


@dataclass(frozen=True, slots=True)
class TrialResult:
    """The figures of a trial, and the error of its last try if that failed."""

    trial: str  # id
    rows: Figures  # on the validation pairs
    run: dict[str, Any]  # seconds, speed and the checkpoint's path
    error: str | None = None
    tests: dict[str, Figures] = field(default_factory=dict)  # by the test's name
    pending: bool = False  # trained, but not yet scored on every test

    @property
    def is_done(self) -> bool:
        """Whether the trial is trained and scored on every test."""
        return self.error is None and not self.pending


def run_trial(plan: SweepPlan, trial: Trial) -> TrialResult:
    """Run a trial to its end, from its last checkpoint if it has one; an error is its result.

    A trial that is trained already is only scored on the tests that are new.
    """
    folder = plan.folder(trial)
    try:
        result = _read_json(folder / RESULT)
        untrained = not (trial.is_baselines or list_checkpoints(folder))
        if result is None or (_is_old(result["rows"]) and untrained):
            _fit_trial(plan, trial)
        elif _is_old(result["rows"]):
            write_json(folder / RESULT, {**result, "rows": _score_validation(plan, trial)})
        for test in plan.config.tests.values():
            if _is_old(_read_json(folder / _name_test(test))):
                write_json(folder / _name_test(test), _score(plan, trial, test))
    except Exception as error:  # the other trials go on
        logger.info("trial %s failed", trial.id, exc_info=True)
        return write_failure(plan, trial, f"{type(error).__name__}: {error}")
    (folder / FAILED).unlink(missing_ok=True)
    ended = read_result(plan, trial)
    assert ended is not None
    return ended


def write_failure(plan: SweepPlan, trial: Trial, reason: str) -> TrialResult:
    """Write why a trial failed, and return its result."""
    write_json(plan.folder(trial) / FAILED, {"error": reason[:_MAX_REASON]})
    result = read_result(plan, trial)
    assert result is not None
    return result


def read_result(plan: SweepPlan, trial: Trial) -> TrialResult | None:
    """Return a trial's result, or None if it has not ended."""
    folder = plan.folder(trial)
    failed, result = _read_json(folder / FAILED), _read_json(folder / RESULT)
    if result is None and failed is None:
        return None
    error = failed["error"] if failed else None
    if result is None or _is_old(result["rows"]):
        return TrialResult(trial.id, {}, {}, error, pending=True)
    tests = {
        name: figures
        for name, test in plan.config.tests.items()
        if not _is_old(figures := _read_json(folder / _name_test(test)))
    }
    pending = len(tests) < len(plan.config.tests)
    # A try that succeeded may have been killed before it removed an earlier failure's file.
    error = error if pending else None
    return TrialResult(trial.id, result["rows"], result["run"], error, tests, pending)


def _is_old(figures: Figures | None) -> bool:
    """Whether there are no figures, or some from before AP was the average precision."""
    return figures is None or not all("AP_clipseg" in row for row in figures.values())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _fit_trial(plan: SweepPlan, trial: Trial) -> None:
    start_s = time.monotonic()
    folder, config = plan.folder(trial), trial.config
    run: dict[str, Any] = {}
    if trial.is_baselines:
        rows = _score_validation(plan, trial)
    else:
        worker = Worker(0, 1, choose_device(None))
        source = plan.open_layers(trial)
        fit(config, source, folder, worker, resume=bool(list_checkpoints(folder)))
        checkpoint = find_checkpoint(folder)
        record = read_record(checkpoint)
        # The last step's validation has the figures that `ldznet evaluate` gives.
        figures = {name: record.validation[name] for name in FIGURE_NAMES}
        rows = {config.head.name: figures | {"num_pairs": trial.num_pairs}}
        run = {"steps": record.step, "checkpoint": str(checkpoint.relative_to(plan.out))}
        run |= _read_speed(folder / METRICS)
    run |= {"seconds": time.monotonic() - start_s, "snapshot": plan.snapshot.digest}
    write_json(folder / RESULT, {"rows": rows, "run": run})


def _name_test(test: TestSplit) -> str:
    """Return the name of a test's file: a digest of its fields, since its name may change."""
    plain = json.dumps(test.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return f"test-{hashlib.sha256(plain.encode()).hexdigest()[:_TEST_DIGITS]}.json"


def _score_validation(plan: SweepPlan, trial: Trial) -> Figures:
    data, limit = trial.config.data, trial.config.validation_pairs
    test = TestSplit(tasks=data.validation, filter=data.validation_filter, limit=limit)
    return _score(plan, trial, test)


def _score(plan: SweepPlan, trial: Trial, test: TestSplit) -> Figures:
    """Score the head of a trial's last checkpoint, or the baselines, on a test's pairs."""
    head = None if trial.is_baselines else load_checkpoint(plan.folder(trial))[0]
    job = ScoringJob(
        source=plan.open_layers(trial),
        data=trial.config.data,
        tasks=test.tasks,
        choice=test.filter,
        batch_size=BATCH_SIZE,
        limit=test.limit,
    )
    counted = PairScorer(job, head, baselines=head is None).count(None)
    names = BASELINES if head is None else (trial.config.head.name,)
    return {name: asdict(metrics.compute()) for name, metrics in zip(names, counted, strict=True)}


def _read_speed(path: Path) -> dict[str, float]:
    """Return pairs a second, and the share of time spent waiting for data, of a whole run."""
    elapsed_s = waited_s = pairs = 0.0
    before = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        record: Mapping[str, Any] = json.loads(line)
        if "loss" not in record:
            continue
        steps, before = record["step"] - before, record["step"]
        part_s = steps / max(record["pairs_per_s"], 1e-9)  # the batch size cancels out below
        elapsed_s += part_s
        waited_s += part_s * record["data_wait"]
        pairs += steps
    if not elapsed_s:
        return {}
    return {"pairs_per_s": pairs / elapsed_s, "data_wait": waited_s / elapsed_s}
