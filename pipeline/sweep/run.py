"""A sweep on Ray Tune: runs its trials, several at once, and writes the tables as they end.

Data flow: the plan -> the trials without a ``result.json`` -> a Tune trial for each, in actors that
are reused, since an actor takes some 6 s to import torch -> their results -> the tables.

Tune schedules, places and replaces the actors; its own files are not needed afterwards. A sweep is
resumed by a new run of Tune over the trials that are left; a trial's progress is in its folder.
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
from pipeline.base.ray_cluster import NodeSize, list_nodes, ray_running
from pipeline.runs.checkpoint import list_checkpoints
from pipeline.runs.lock import RunLock
from pipeline.runs.new_head import check_model
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.heat_map import NAME as HEAT_MAP
from pipeline.sweep.heat_map import write_heat_maps
from pipeline.sweep.results import MARKDOWN, PARQUET, format_failures, write_results
from pipeline.sweep.trial import RESULT, TrialResult, read_result, run_trial, write_failure
from pipeline.sweep.trials import SweepPlan, Trial, plan_sweep

WRITE_EVERY_S = 5.0  # least time between two writings of the tables
BASELINES_GPU = 0.25  # share of a GPU if all trials are baselines, which are limited by reading
MAX_DEATHS = 2  # retries of a trial whose worker died; a trial that fails is not retried
TUNE_FOLDER = "tune"  # under OUT while Tune runs
RESULT_KEY = "trial_result"  # of a trial's result as JSON among those that Tune reports
_MAX_LISTED = 20
_DIED = (
    "WorkerDied: its process ended in {tries} tries: out of memory, a crash, or killed. See the "
    "worker's log in Ray's session folder (/tmp/ray/session_latest/logs); `--trials-at-once 0` "
    "runs it in one process"
)
_LOST = "TrialLost: Ray Tune ended without an answer of it; LDZNET_LOG=info says more"


@dataclass(frozen=True, slots=True)
class TrialResources:
    """How many trials run at once, and what each needs of its node."""

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
    """Choose what is not given: one CPU for a trial, and as many trials as the nodes can hold.

    If a node has a GPU, a trial takes the largest share of one that a trial's head asks for.

    Raises:
        ValueError: no node can hold a trial.
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
    """The results of a sweep's trials so far, and the files written of them."""

    plan: SweepPlan
    results: dict[str, TrialResult] = field(default_factory=dict)  # this and the next by trial id
    failures: dict[str, TrialResult] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)  # ids of finished trials
    maps: list[str] = field(default_factory=list)  # file names of the heat maps
    _written_s: float = 0.0

    def add(self, result: TrialResult) -> None:
        """Set a trial's result, in place of an earlier one."""
        self.results[result.trial] = result
        self.failures.pop(result.trial, None)
        if result.error is not None:
            self.failures[result.trial] = result
        elif result.is_done:
            self.done.add(result.trial)

    def record(self, result: TrialResult, progress: Progress) -> None:
        """Add the result of a trial that has ended, and write the tables if that is due."""
        self.add(result)
        progress.update(len(self.done), failed=len(self.failures))
        if time.monotonic() - self._written_s > WRITE_EVERY_S:
            write_results(self.plan, self.results)
            self._written_s = time.monotonic()

    def write(self) -> None:
        """Write the tables, and the heat map if one is asked for; remove those of other axes."""
        rows = write_results(self.plan, self.results)
        self.maps = write_heat_maps(self.plan, rows) if self.plan.config.heat_map else []
        for drawn in self.plan.out.glob(f"{HEAT_MAP}[.-]*png"):
            if drawn.name not in self.maps:
                drawn.unlink()

    def describe(self, *, command: str | None = None) -> str:
        """Summarise an ended sweep in a few lines; ``command`` runs the failed trials again."""
        lines = [f"{len(self.done)} of {len(self.plan.trials)} trials are done"]
        lines += [f"  {self.plan.out / name}" for name in (MARKDOWN, PARQUET, *self.maps)]
        ids = {trial.id for trial in self.plan.trials}
        finished = self.plan.out.glob(f"trials/*/{RESULT}")
        if others := sum(path.parent.name not in ids for path in finished):
            lines.append(f"{others} trials of other settings stay in trials/, and are in no table")
        errors = {trial: result.error or "" for trial, result in self.failures.items()}
        failed = format_failures(self.plan, errors)
        lines += [f"failed: {line}" for line in failed[:_MAX_LISTED]]
        if len(failed) > _MAX_LISTED:
            lines.append(f"… and {len(failed) - _MAX_LISTED} reasons more, listed in {MARKDOWN}")
        if self.failures and command is not None:
            lines.append(f"to try them again:\n  {command}")
        return "\n".join(lines)


@contextmanager
def open_sweep(config: SweepConfig, store_url: str, out: Path) -> Iterator[SweepPlan]:
    """Lock a sweep's folder and plan the sweep, for ``run_sweep`` inside the ``with`` block.

    The lock comes first, because planning pins the snapshot that a running sweep reads.

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
    """Run the trials of ``open_sweep``'s plan that are left, among them those that failed before.

    The tables are written also if the sweep is interrupted.

    Args:
        at_once: How many trials run at once; 0 runs them here, one after another, without Ray.
        num_cpus, num_gpus: What a trial needs; ``choose_resources`` chooses what is None.

    Raises:
        ValueError: no node can hold a trial.
        ModelFilesError: a head starts from a model whose folder is gone.
    """
    run = SweepRun(plan)
    left = _load_finished(run)
    for trial in left:
        if not (trial.is_baselines or list_checkpoints(plan.folder(trial))):
            check_model(trial.config.head, plan.layers[trial.config.data.latents or ""])
    progress = Progress(
        "sweep",
        total=len(plan.trials),
        unit="trials",
        metrics_path=plan.out / "metrics.jsonl",
        start=len(run.done),
    )
    try:
        if left and at_once == 0:
            with progress:
                for trial in left:
                    run.record(run_trial(plan, trial), progress)
        elif left:
            with ray_running():
                resources = choose_resources(
                    list_nodes(), left, at_once=at_once, num_cpus=num_cpus, num_gpus=num_gpus
                )
                with progress:
                    _run_on_tune(run, left, resources, progress)
    finally:
        run.write()
    return run


def _load_finished(run: SweepRun) -> list[Trial]:
    """Add the results of earlier runs; return the trials that are not finished."""
    left = []
    for trial in run.plan.trials:
        result = read_result(run.plan, trial)
        if result is None or not result.is_done:
            left.append(trial)
        if result is not None and result.rows:  # scored, but perhaps not on every test
            run.add(replace(result, error=None))
    return left


def _run_on_tune(
    run: SweepRun, trials: Sequence[Trial], resources: TrialResources, progress: Progress
) -> None:
    plan = run.plan
    folder = plan.out / TUNE_FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
    asked = {"CPU": resources.num_cpus, "GPU": resources.num_gpus}
    trainable = tune.with_parameters(_SweepTrainable, plan=plan, num_cpus=resources.num_cpus)
    _configure_tune(resources.at_once)
    Tuner(
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
    ).fit()
    for trial in trials:
        if trial.id not in run.results:
            run.record(write_failure(plan, trial, _LOST), progress)
    shutil.rmtree(folder, ignore_errors=True)


def _configure_tune(at_once: int) -> None:
    """Set what Tune reads from the environment alone."""
    os.environ |= {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # its own waits for running trials, maybe for hours
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # four files a trial that nobody reads
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they are in the table
        "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a box at any verbosity
        "TUNE_MAX_PENDING_TRIALS_PG": str(at_once),  # each is a placement group that waits
    }


class _SweepTrainable(tune.Trainable):
    """An actor that runs one trial after another; to Tune a trial is a single step."""

    def setup(self, config: dict[str, Any], plan: SweepPlan, num_cpus: float) -> None:
        """Keep the plan for all the trials that this actor will run."""
        torch.set_num_threads(max(1, int(num_cpus)))
        self._plan = plan
        self._trials = {trial.id: trial for trial in plan.trials}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Allow Tune to reuse this actor for another trial."""
        return True

    def step(self) -> dict[str, Any]:
        """Run the trial to its end."""
        result = run_trial(self._plan, self._trials[self.config["trial"]])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # other trials share the GPU
        return {RESULT_KEY: json.dumps(asdict(result)), tune.result.DONE: True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: a trial's checkpoints are in its own folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing."""


class _Recorder(Callback):
    """Records the trials' results in this process; a copy that Tune pickles does nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Callback, ()

    def __init__(self, run: SweepRun, trials: Sequence[Trial], progress: Progress) -> None:
        self._run, self._progress = run, progress
        self._trials = {trial.id: trial for trial in trials}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if RESULT_KEY in result:
            self._run.record(TrialResult(**json.loads(result[RESULT_KEY])), self._progress)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        failed = self._trials[trial.config["trial"]]
        reason = _DIED.format(tries=MAX_DEATHS + 1)
        self._run.record(write_failure(self._run.plan, failed, reason), self._progress)
