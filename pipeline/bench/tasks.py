"""What Ray Data costs a task: the driver's time and memory, with actors that answer at once.

Data flow: items without tars -> ``actor_pool.run_items``, as ``encode`` calls it -> a row a size,
each from a process of its own; the last row carries the costs on to a million tasks.
"""

import resource
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pipeline.base.ray_cluster import SPARE_CPUS, ray_running
from pipeline.corpus.tasks import Task
from pipeline.encode.actor_pool import (
    WINDOW,
    ActorBounds,
    ActorPool,
    pack_outcomes,
    run_items,
    unpack_items,
)
from pipeline.stage.encode_stage import MAX_IN_FLIGHT
from pipeline.stage.work import Outcome, WorkItem

TARGET = 1_000_000  # tasks that the last row is about
_TAR_BYTES = 10**9


@dataclass(frozen=True, slots=True)
class TaskCost:
    """What a size cost the driver; ``measured`` is False of what others say of a larger one.

    ``start_s`` is until the first outcome, ``wall_ms_a_task`` from then to the last. ``before_mb``
    is what the driver held at the start, Ray, imported and connected, and the items themselves;
    ``peak_mb`` its resident peak.
    """

    tasks: int
    window: int
    measured: bool
    start_s: float
    wall_ms_a_task: float
    cpu_ms_a_task: float  # of the driver's process, all threads, the start too
    before_mb: float
    grown_mb: float
    peak_mb: float


class _IdleActor:
    """Answers each item at once."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        items = unpack_items(batch)
        return pack_outcomes(Outcome(task=item.task.id, status="committed") for item in items)


def list_bench_items(num: int) -> list[WorkItem]:
    """Return ``num`` work items with names of the usual length, of tars that are nowhere."""
    return [
        WorkItem(
            Task(
                f"train-{i:08d}-{i:08x}",
                f"s3://bucket/corpora/laion/train-{i:08d}.tar",
                _TAR_BYTES + i,
            ),
            None,
            None,
        )
        for i in range(num)
    ]


def measure_run(num_tasks: int, num_actors: int, window: int) -> TaskCost:
    """Run so many items in this process, which should be a fresh one, and return what it cost.

    Raises:
        RuntimeError: not every item had its outcome.
    """
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
        start_s, start_cpu_s = time.perf_counter(), _cpu_s()
        first_s, num_done = 0.0, 0
        for outcome in run_items(pool, items, seed=0):
            first_s = first_s or time.perf_counter()
            num_done += outcome.status == "committed"
        wall_s, cpu_s = time.perf_counter() - first_s, _cpu_s() - start_cpu_s
        peak_mb = read_memory_mb("VmHWM")
    if num_done != num_tasks:
        raise RuntimeError(f"expected {num_tasks} outcomes, got {num_done}")
    return TaskCost(
        tasks=num_tasks,
        window=window,
        measured=True,
        start_s=first_s - start_s,
        wall_ms_a_task=1e3 * wall_s / num_tasks,
        cpu_ms_a_task=1e3 * cpu_s / num_tasks,
        before_mb=before_mb,
        grown_mb=peak_mb - before_mb,
        peak_mb=peak_mb,
    )


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def read_memory_mb(field: str) -> float:
    """Return a field of this process' memory in MB from Linux' ``/proc``: VmRSS, or VmHWM."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def carry_on(short: TaskCost, long: TaskCost, windows: TaskCost, num_tasks: int) -> TaskCost:
    """Return what lines through measured sizes say of ``num_tasks`` in windows of ``WINDOW``.

    ``short`` and ``long`` ran in one window, ``windows`` as many tasks as ``long`` in windows as
    large as ``short``. In a window memory grows from ``short`` to ``long``; from window to window
    it grows from ``short`` to ``windows``. Time is that of ``windows``, the actors' starts and all.
    """
    more = long.tasks - short.tasks
    items_mb = (long.before_mb - short.before_mb) / more
    in_window_mb = (long.grown_mb - short.grown_mb) / more
    left_mb = max(0.0, (windows.grown_mb - short.grown_mb) / more)
    grown_mb = short.grown_mb + in_window_mb * (WINDOW - short.tasks)
    grown_mb += left_mb * (num_tasks - WINDOW)
    before_mb = short.before_mb + items_mb * (num_tasks - short.tasks)
    return TaskCost(
        tasks=num_tasks,
        window=WINDOW,
        measured=False,
        start_s=long.start_s * WINDOW / long.tasks,
        wall_ms_a_task=long.wall_ms_a_task,
        cpu_ms_a_task=windows.cpu_ms_a_task,
        before_mb=before_mb,
        grown_mb=grown_mb,
        peak_mb=before_mb + grown_mb,
    )


def measure_tasks(sizes: Sequence[int], *, num_actors: int) -> list[TaskCost]:
    """Measure each size in a process and a local Ray of its own; add what they say of ``TARGET``.

    Of two sizes or more the largest runs again in windows of the one before it.
    """
    runs = [(num, num) for num in sorted(set(sizes))]
    if len(runs) > 1:
        runs.append((runs[-1][0], runs[-2][0]))
    rows = []
    for num, window in runs:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            rows.append(fresh.submit(measure_run, num, num_actors, window).result())
    if len(runs) > 1:
        short, long, windows = rows[-3:]
        rows.append(carry_on(short, long, windows, TARGET))
    return rows
