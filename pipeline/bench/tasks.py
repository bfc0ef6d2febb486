"""What a task costs the driver of an encode run, with actors that answer at once.

Data flow: work items without tars -> ``actor_pool.run_items``, as ``encode`` calls it -> one row
for each number of tasks, each from a process of its own.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.base.ray_cluster import SPARE_CPUS, ray_running
from pipeline.bench.fresh_process import read_memory_mb, run_fresh
from pipeline.corpus.tasks import Task
from pipeline.encode.actor_pool import ActorBounds, ActorPool, pack_outcome, run_items, unpack_item
from pipeline.stage.encode_stage import MAX_IN_FLIGHT
from pipeline.stage.work import TaskOutcome, WorkItem

_CORPUS = "s3://bucket/corpora/laion"


@dataclass(frozen=True, slots=True)
class TaskCost:
    """What so many tasks cost the driver.

    ``start_s`` is the time until the first outcome, ``wall_ms_a_task`` that from there to the last.
    ``before_mb`` is the driver's memory at the start: Ray and the items. ``peak_mb`` is the
    resident peak, ``grown_mb`` the difference.
    """

    tasks: int
    window: int
    start_s: float
    wall_ms_a_task: float
    cpu_ms_a_task: float  # of the driver's process, all threads, the start too
    before_mb: float
    grown_mb: float
    peak_mb: float


class _IdleActor:
    """An actor that answers each item at once."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return pack_outcome(TaskOutcome(task=unpack_item(batch).task.id, status="committed"))


def list_bench_items(num: int) -> list[WorkItem]:
    """Return work items with names of the usual length, for tars that do not exist."""
    return [
        WorkItem(Task(f"train-{i:08d}-{i:08x}", f"{_CORPUS}/train-{i:08d}.tar", 10**9), None, None)
        for i in range(num)
    ]


def measure_run(num_tasks: int, num_actors: int, window: int) -> TaskCost:
    """Run so many items from this, a fresh process; RuntimeError if one got no outcome."""
    with ray_running(num_cpus=num_actors + SPARE_CPUS):
        items = list_bench_items(num_tasks)
        bounds = ActorBounds(num_actors, num_actors).cap(num_tasks)
        pool = ActorPool(
            actor=_IdleActor,
            arguments=(),
            bounds=bounds,
            in_flight=MAX_IN_FLIGHT,
            num_cpus=1,
            window=window,
        )
        before_mb = read_memory_mb("VmRSS")
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        first_s, num_done = 0.0, 0
        for outcome in run_items(pool, items, seed=0):
            first_s = first_s or time.perf_counter()
            num_done += outcome.status == "committed"
        wall_s, cpu_s = time.perf_counter() - first_s, time.process_time() - start_cpu_s
        peak_mb = read_memory_mb("VmHWM")
    if num_done != num_tasks:
        raise RuntimeError(f"expected {num_tasks} outcomes, got {num_done}")
    return TaskCost(
        tasks=num_tasks,
        window=window,
        start_s=first_s - start_s,
        wall_ms_a_task=1e3 * wall_s / num_tasks,
        cpu_ms_a_task=1e3 * cpu_s / num_tasks,
        before_mb=before_mb,
        grown_mb=peak_mb - before_mb,
        peak_mb=peak_mb,
    )


def measure_tasks(sizes: Sequence[int], *, num_actors: int) -> list[TaskCost]:
    """Measure each number of tasks in one window, in a process and a local Ray of its own.

    The largest runs again in windows of the number before it: what a window leaves behind.
    """
    runs = [(num, num) for num in sorted(set(sizes))]
    if len(runs) > 1:
        runs.append((runs[-1][0], runs[-2][0]))
    return [run_fresh(measure_run, num, num_actors, window) for num, window in runs]
