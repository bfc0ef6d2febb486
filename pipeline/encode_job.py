"""Encoding a corpus on Ray Data: rows are tasks, an actor pool runs the encode stage.

Ray carries only task names and outcomes; the actors read tars and write Zarr themselves.
"""

import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

from pipeline.corpus import Task
from pipeline.encode import EncodeConfig, EncodeRun, EncodeStage, Outcome
from pipeline.encode_totals import EncodeTotals
from pipeline.missing import WorkItem
from pipeline.progress import Progress
from pipeline.ray_start import SPARE_CPUS, count_cores, count_gpus, ray_running

logger = logging.getLogger(__name__)

MAX_TASK_RETRIES = 3
NUM_POOLS = 2


class _EncodeActor:
    """The encode stage as Ray Data calls it: work items in, outcomes out, both as JSON."""

    def __init__(self, config: EncodeConfig) -> None:
        self._stage = EncodeStage(config)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        items = [_item_from_json(text) for text in batch["item"]]
        return {"outcome": [json.dumps(asdict(self._stage.encode(item))) for item in items]}


def _item_from_json(text: str) -> WorkItem:
    plain = json.loads(text)
    return WorkItem(**{**plain, "task": Task(**plain["task"])})


def encode_on_ray(
    config: EncodeConfig, items: Sequence[WorkItem], *, num_actors: int, num_gpus: float
) -> Iterator[Outcome]:
    """Encode work items on a pool of actors and yield outcomes as tasks commit.

    Ray must be started. A worker that dies is replaced and its task tried again. A task without an
    answer after ``MAX_TASK_RETRIES`` + 1 tries is given to a second pool once the first is done:
    while Ray does not know yet that a node is lost, tries on it fail at once. What that does not
    answer either is yielded as failed, after all others.
    """
    left = {item.task.id: item for item in items}
    for _ in range(NUM_POOLS):
        if left:
            for outcome in _encode_on_pool(config, list(left.values()), num_actors, num_gpus):
                left.pop(outcome.task, None)
                yield outcome
    for task in sorted(left):
        error = (
            "WorkerDied: no answer; a task that kills its worker is tried "
            f"{NUM_POOLS * (MAX_TASK_RETRIES + 1)} times. See the worker's log in Ray's session "
            "folder (/tmp/ray/session_latest/logs), or set LDZNET_LOG=info"
        )
        yield Outcome(task=task, status="failed", error=error)


def _encode_on_pool(
    config: EncodeConfig, items: Sequence[WorkItem], num_actors: int, num_gpus: float
) -> Iterator[Outcome]:
    """Encode work items on one pool; yield an outcome of each that a worker lived to answer."""
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = -1
    context.actor_task_retry_on_errors = False  # the stage turns a task's faults into outcomes
    context.enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # its log file keeps everything
            handler.setLevel(logging.ERROR)
    rows = [{"item": json.dumps(asdict(item))} for item in items]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # no named parameter replaces these
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _EncodeActor,
            fn_constructor_args=(config,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            num_cpus=config.num_threads,
            num_gpus=num_gpus,
            max_restarts=-1,  # a dead worker is always replaced
            max_task_retries=MAX_TASK_RETRIES,  # Ray Data's own default is for ever
        )
    for row in dataset.iter_rows():
        yield Outcome(**json.loads(row["outcome"]))


def encode_here(config: EncodeConfig, items: Sequence[WorkItem]) -> Iterator[Outcome]:
    """Encode work items in this process, without Ray."""
    stage = EncodeStage(config)
    for item in items:
        yield stage.encode(item)


def run_encode(
    run: EncodeRun,
    *,
    metrics_path: Path | None,
    num_actors: int | None = None,
    num_threads: int | None = None,
    num_gpus: float | None = None,
    max_failures: int | None = None,
) -> EncodeTotals:
    """Encode what a run is missing, showing progress from committed work.

    More than ``max_failures`` failed tasks end the run; by default ``default_max_failures``.

    ``num_actors`` is by default one a GPU, or one a core where there are none; 0 encodes in this
    process, without Ray. ``num_threads`` is a worker's share of the smallest node's cores by
    default, ``num_gpus`` 1 where the cluster has any now: name it where GPU nodes are yet to come.
    """
    if not run.items:
        return EncodeTotals()
    if max_failures is None:
        max_failures = default_max_failures(len(run.items))
    if num_actors == 0:
        config = replace(run.config, num_threads=num_threads)
        return _follow(encode_here(config, run.items), run, metrics_path, max_failures)
    num_cores = os.cpu_count() or 1
    wanted_cpus = (num_actors or 1) * (num_threads or 1)
    with ray_running(num_cpus=max(num_cores, wanted_cpus) + SPARE_CPUS):
        gpus_there = count_gpus()
        size = min(num_actors or gpus_there or num_cores, len(run.items))
        config = replace(run.config, num_threads=num_threads or max(1, count_cores() // size))
        if num_gpus is None:
            num_gpus = 1 if gpus_there else 0
        outcomes = encode_on_ray(config, run.items, num_actors=size, num_gpus=num_gpus)
        return _follow(outcomes, run, metrics_path, max_failures)


def default_max_failures(num_tasks: int) -> int:
    """Return how many tasks of a run may fail before it stops: 20, and one in a hundred."""
    return 20 + num_tasks // 100


def _follow(
    outcomes: Iterator[Outcome], run: EncodeRun, metrics_path: Path | None, max_failures: int
) -> EncodeTotals:
    totals = EncodeTotals()
    done = run.num_done
    with Progress(
        "encode", total=run.num_tasks, unit="tasks", metrics_path=metrics_path, start=done
    ) as progress:
        for outcome in outcomes:
            totals.add(outcome)
            done += outcome.status != "failed"
            progress.update(done, **totals.figures())
            if len(totals.failures) > max_failures:
                totals.stopped = True
                break
    return totals
