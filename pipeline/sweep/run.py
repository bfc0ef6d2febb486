"""A sweep on Ray Tune: many small trials over one store, and their results as they come.

Data flow: the plan -> what is finished already, by its ``result.json`` -> a Tune trial for each of
the others, some at once, one after another in actors that stay -> an outcome each -> the tables.

Tune schedules, places and replaces actors; nothing that a sweep needs lies in Tune's own files. A
trial's id names it over runs, and what it has reached is in its folder, so that a new run of Tune
with what is left is how a sweep goes on: after a kill, with another number of trials at once, or
with another axis. An actor imports torch and the rest (some 6 s) once, not once a trial.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner

from pipeline.base.progress import Progress
from pipeline.base.ray_cluster import SPARE_CPUS, NodeSize, list_nodes, ray_running
from pipeline.runs.lock import RunLock
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.heat_map import write_heat_maps
from pipeline.sweep.results import MARKDOWN, PARQUET, write_results
from pipeline.sweep.trial import Outcome, read_outcome, run_trial, write_failure
from pipeline.sweep.trials import SweepPlan, Trial, plan_sweep

WRITE_EVERY_S = 5.0  # between two writings of the tables
BASELINES_GPU = 0.25  # of one, for trials that are baselines alone: they wait for reads
MAX_DEATHS = 2  # of a trial's worker, before the trial is failed; faults are not tried again
TUNE_FOLDER = "tune"  # under OUT while Tune runs
_MAX_LISTED = 20
_DIED = (
    "WorkerDied: its process ended in {tries} tries: out of memory, a crash, or killed. See the "
    "worker's log in Ray's session folder (/tmp/ray/session_latest/logs); `--trials-at-once 0` "
    "runs it in one process"
)
_LOST = "TrialLost: Ray Tune ended without an answer of it; LDZNET_LOG=info says more"


@dataclass(frozen=True, slots=True)
class TrialResources:
    """How many trials run at once, and what each asks of its node; 0 at once: in this process."""

    at_once: int
    num_cpus: float
    num_gpus: float


def choose_resources(
    nodes: Sequence[NodeSize],
    trials: Sequence[Trial],
    *,
    at_once: int | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
) -> TrialResources:
    """Choose what is not given: a CPU a trial, and as many trials as the nodes have room for.

    Where a node has a GPU a trial takes the largest share of one that a trial's head asks for.

    Raises:
        ValueError: no node could hold a trial.
    """
    cpus = 1.0 if num_cpus is None else num_cpus
    if num_gpus is None:
        shares = [t.config.head.options.gpu_share for t in trials if not t.is_baselines]
        there = any(node.num_gpus >= 1 for node in nodes)
        num_gpus = max(shares, default=BASELINES_GPU) if there else 0.0
    room = sum(node.count_actors(cpus, num_gpus) for node in nodes)
    if not room:
        raise ValueError(
            f"--cpus-per-trial, --gpus-per-trial: no node has {cpus:g} CPUs and {num_gpus:g} GPUs "
            f"for a trial, got {list(nodes)}; ask for less"
        )
    return TrialResources(max(1, min(at_once or room, room, len(trials))), cpus, num_gpus)


@dataclass
class SweepRun:
    """What has become of a sweep's trials so far, and the files that say it."""

    plan: SweepPlan
    outcomes: dict[str, Outcome] = field(default_factory=dict)  # by trial
    files: list[str] = field(default_factory=list)
    maps: list[str] = field(default_factory=list)  # those of the files that are heat maps
    _failed: dict[str, Outcome] = field(default_factory=dict)  # asked at every trial's end
    _done: set[str] = field(default_factory=set)  # and so is this
    _written_s: float = 0.0

    @property
    def failures(self) -> list[Outcome]:
        """The trials that failed."""
        return list(self._failed.values())

    @property
    def num_failed(self) -> int:
        """Trials that failed."""
        return len(self._failed)

    @property
    def num_done(self) -> int:
        """Trials that are finished."""
        return len(self._done)

    def take(self, outcome: Outcome) -> None:
        """Take a trial's outcome, in place of an earlier one of it."""
        self.outcomes[outcome.trial] = outcome
        self._failed.pop(outcome.trial, None)
        if outcome.error is not None:
            self._failed[outcome.trial] = outcome
        elif outcome.is_done:
            self._done.add(outcome.trial)

    def add(self, outcome: Outcome) -> None:
        """Take a trial's outcome; write the tables anew, but not for each of many."""
        self.take(outcome)
        if time.monotonic() - self._written_s > WRITE_EVERY_S:
            write_results(self.plan, self.outcomes)
            self._written_s = time.monotonic()

    def write(self) -> None:
        """Write the tables, and the heat map where one is asked for."""
        rows = write_results(self.plan, self.outcomes)
        self.maps = write_heat_maps(self.plan, rows) if self.plan.config.heat_map else []
        self.files = [MARKDOWN, PARQUET, *self.maps]

    def describe(self, *, command: str | None = None) -> str:
        """What came of it in a few lines; ``command`` is the one that goes on."""
        lines = [f"{self.num_done} of {len(self.plan.trials)} trials are done"]
        lines += [f"  {self.plan.out / name}" for name in self.files]
        failures = self.failures
        for outcome in failures[:_MAX_LISTED]:
            reason = (outcome.error or "").splitlines()[0]
            lines.append(f"failed: {self.plan.out / 'trials' / outcome.trial}: {reason}")
        if len(failures) > _MAX_LISTED:
            lines.append(f"… and {len(failures) - _MAX_LISTED} more, listed in {MARKDOWN}")
        if failures and command is not None:
            lines.append(f"to try them again:\n  {command}")
        return "\n".join(lines)


@contextmanager
def open_sweep(config: SweepConfig, store_url: str, out: Path) -> Iterator[SweepPlan]:
    """Hold a sweep's folder and plan the sweep, for ``run_sweep`` inside the ``with`` block.

    Held before the plan is made: that pins the snapshot, which a sweep that runs there reads.

    Raises:
        RunHeldError: another sweep runs in ``out``.
        SpecError: as ``plan_sweep``.
    """
    with RunLock(out.absolute(), "sweep"):
        yield plan_sweep(config, store_url, out)


def run_sweep(
    plan: SweepPlan,
    *,
    at_once: int | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
) -> SweepRun:
    """Run the trials that are not finished; failed ones of an earlier run are tried again.

    ``at_once`` of 0 runs them here, one after another, without Ray. What is None
    ``choose_resources`` chooses. The tables are written in any case, also when interrupted. The
    plan is of ``open_sweep``, which holds the folder.

    Raises:
        ValueError: no node can hold a trial.
    """
    run = SweepRun(plan)
    left = _take_finished(run)
    progress = Progress(
        "sweep",
        total=len(plan.trials),
        unit="trials",
        metrics_path=plan.out / "metrics.jsonl",
        start=run.num_done,
    )
    try:
        if left and at_once == 0:
            with progress:
                for trial in left:
                    _note(run, run_trial(plan, trial), progress)
        elif left:
            with ray_running(num_cpus=(os.cpu_count() or 1) + SPARE_CPUS):
                resources = choose_resources(
                    list_nodes(), left, at_once=at_once, num_cpus=num_cpus, num_gpus=num_gpus
                )
                with progress:
                    _run_on_tune(run, left, resources, progress)
    finally:
        run.write()
    return run


def _take_finished(run: SweepRun) -> list[Trial]:
    """Note what earlier runs found; return the trials of which something is left to do."""
    left = []
    for trial in run.plan.trials:
        outcome = read_outcome(run.plan, trial)
        if outcome is None or not outcome.is_done:
            left.append(trial)
        if outcome is not None and outcome.rows:  # scored, though perhaps not on every test
            run.take(replace(outcome, error=None))
    return left


def _note(run: SweepRun, outcome: Outcome, progress: Progress) -> None:
    run.add(outcome)
    progress.update(run.num_done, failed=run.num_failed)


def _run_on_tune(
    run: SweepRun, trials: Sequence[Trial], resources: TrialResources, progress: Progress
) -> None:
    plan = run.plan
    folder = plan.out / TUNE_FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    asked = {"CPU": resources.num_cpus, "GPU": resources.num_gpus}
    trainable = tune.with_parameters(_SweepTrainable, plan=plan, num_cpus=resources.num_cpus)
    tuner = Tuner(
        tune.with_resources(trainable, {name: num for name, num in asked.items() if num}),
        param_space={"trial": tune.grid_search([trial.id for trial in trials])},
        tune_config=TuneConfig(
            reuse_actors=True,
            max_concurrent_trials=resources.at_once,
            trial_dirname_creator=lambda trial: trial.config["trial"],
        ),
        run_config=RunConfig(
            name="sweep",
            storage_path=str(folder),
            verbose=0,
            callbacks=[_Recorder(run, trials, progress)],
            failure_config=FailureConfig(max_failures=MAX_DEATHS),
            checkpoint_config=CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
        ),
    )
    with _tune_settings(resources.at_once):
        tuner.fit()
    for trial in trials:
        if trial.id not in run.outcomes:
            _note(run, write_failure(plan, trial, _LOST), progress)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _tune_settings(at_once: int) -> Iterator[None]:
    """Set what Tune takes from the environment alone, for as long as it runs."""
    settings = {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # its own waits for running trials, maybe for hours
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # four files a trial that nobody reads
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they are in the table
        "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a box at any verbosity
        "TUNE_MAX_PENDING_TRIALS_PG": str(at_once),  # each is a placement group that waits
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _SweepTrainable(tune.Trainable):
    """One trial after another, as Tune calls it: a trial is one step."""

    def setup(self, config: dict[str, Any], plan: SweepPlan, num_cpus: float) -> None:
        """Keep the plan for all the trials that this actor will be given."""
        torch.set_num_threads(max(1, int(num_cpus)))
        self._plan = plan
        self._trials = {trial.id: trial for trial in plan.trials}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another trial: nothing of the last one is left."""
        return True

    def step(self) -> dict[str, Any]:
        """Run the trial to its end."""
        outcome = run_trial(self._plan, self._trials[self.config["trial"]])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the GPU is shared: no trial keeps what it does not use
        return {"outcome": json.dumps(asdict(outcome)), tune.result.DONE: True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: a trial's checkpoints are in its own folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing, for the same reason."""


class _Recorder(Callback):
    """Notes what Tune hears of trials, in this process alone: Tune pickles its callbacks."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Callback, ()

    def __init__(self, run: SweepRun, trials: Sequence[Trial], progress: Progress) -> None:
        self._run, self._progress = run, progress
        self._trials = {trial.id: trial for trial in trials}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "outcome" in result:
            _note(self._run, Outcome(**json.loads(result["outcome"])), self._progress)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        failed = self._trials[trial.config["trial"]]
        reason = _DIED.format(tries=MAX_DEATHS + 1)
        _note(self._run, write_failure(self._run.plan, failed, reason), self._progress)
