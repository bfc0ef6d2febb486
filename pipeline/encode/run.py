"""Runs the encode stage over all tasks that a store lacks: the start of ``ldznet encode``.

On Ray a pool of actors (``actor_pool``) each runs a stage; without Ray the stage runs in this
process. Progress, ``failed.jsonl`` and the totals follow from the tasks' outcomes.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from secrets import randbits
from typing import Any

from pipeline.base.progress import Progress
from pipeline.base.ray_cluster import (
    SPARE_CPUS,
    ActorWatch,
    NodeSize,
    find_node,
    list_nodes,
    ray_running,
)
from pipeline.encode.actor_pool import ActorBounds, ActorPool, pack_outcome, run_items, unpack_item
from pipeline.encode.failures import FailureLog
from pipeline.encode.metrics import ActorGauge, EncodeMetrics
from pipeline.encode.missing import update_record_tables
from pipeline.encode.outage_watch import watching_run
from pipeline.encode.prepare import EncodeRun
from pipeline.encode.task_queue import TaskQueue, ThisMachine
from pipeline.encode.totals import EncodeTotals
from pipeline.stage.encode_stage import MAX_IN_FLIGHT, EncodeStage
from pipeline.stage.lanes import StageClosedError
from pipeline.stage.work import EncodeConfig, TaskOutcome, WorkItem

logger = logging.getLogger(__name__)

END_LIMIT_S = 5.0  # from SIGTERM to an actor's end; schedulers give 30 s before they kill
MAX_DECODERS = 8  # of an actor on a GPU, by default


def run_encode(
    run: EncodeRun,
    *,
    metrics_path: Path | None,
    actors: ActorBounds | None = None,
    num_threads: int | None = None,
    num_decoders: int | None = None,
    num_gpus: float | None = None,
    max_failures: int | None = None,
    totals: EncodeTotals | None = None,
) -> EncodeTotals:
    """Encode what a run lacks, and show progress.

    ``choose_workers`` chooses what is None of ``actors``, ``num_threads``, ``num_decoders`` and
    ``num_gpus`` from the nodes that are there now: name the first and the last where GPU nodes will
    come later. 0 actors encode in this process, without Ray.

    Args:
        metrics_path: where progress is recorded, with ``failed.jsonl`` beside it; None for nowhere.
        max_failures: more failed tasks stop the run; default ``default_max_failures``.
        totals: those to add to, for callers that want them after an interrupt too.

    Raises:
        ValueError: no node can hold an actor.
    """
    totals = totals or EncodeTotals.of_run(run)
    if max_failures is None:
        max_failures = default_max_failures(len(run.items))
    if not run.items or (actors is not None and actors.max == 0):
        config = replace(
            run.config,
            num_threads=num_threads,
            num_decoders=num_decoders or run.config.num_decoders,
            stall_s=None,  # no watchdog: a person may stop the process by Ctrl-Z
        )
        queue = TaskQueue(
            run.items, lambda items, _: encode_here(config, items), ThisMachine(), max_failures
        )
        _follow(queue, run, metrics_path, totals)
        return totals
    num_cores = max(os.cpu_count() or 1, actors.max if actors else 1)
    with ray_running(num_cpus=num_cores + SPARE_CPUS):
        workers = choose_workers(
            list_nodes(),
            num_tasks=len(run.items),
            bounds=actors,
            num_threads=num_threads,
            num_decoders=num_decoders,
            num_gpus=num_gpus,
        )
        logger.info("%s", workers)
        totals.num_actors = workers.bounds.max
        pool = _build_pool(run.config, workers)
        gauge = ActorGauge(run.config, num_max=workers.bounds.max)
        with ActorWatch(gauge.set_alive) as watch, watching_run(run.config, run.items):
            totals.count_alive = watch.count
            queue = TaskQueue(
                run.items,
                lambda items, avoided: run_items(
                    replace(pool, avoided=tuple(avoided)), items, seed=randbits(64)
                ),
                _RayNodes(pool, watch),
                max_failures,
            )
            _follow(queue, run, metrics_path, totals)
    return totals


def default_max_failures(num_tasks: int) -> int:
    """Return how many tasks of a run may fail before it stops: 20, and one in a hundred."""
    return 20 + num_tasks // 100


@dataclass(frozen=True, slots=True)
class _RayNodes:
    """The nodes of the cluster, by Ray's ids: ``task_queue.Nodes``."""

    pool: ActorPool
    watch: ActorWatch

    def list_at_work(self) -> Collection[str]:
        return self.watch.nodes

    def has_others(self, names: Collection[str]) -> bool:
        return self.pool.count_room(list_nodes(names)) > 0


def _follow(
    queue: TaskQueue, run: EncodeRun, metrics_path: Path | None, totals: EncodeTotals
) -> None:
    totals.start_clock()  # Ray's start does not count
    failed = metrics_path.with_name("failed.jsonl") if metrics_path else None
    progress = Progress(
        "encode",
        total=run.num_tasks,
        unit="tasks",
        metrics_path=metrics_path,
        start=run.num_done,
        source=totals.report,
    )
    with (
        closing(FailureLog(failed, urls=totals.urls)) as failure_log,
        progress,
        closing(queue.run()) as outcomes,
    ):
        for outcome in chain((failed.outcome for failed in run.failed), outcomes):
            totals.add(outcome)
            failure_log.add(outcome)
            totals.failed_list = failure_log.path
        totals.stopped = queue.stopped
        if queue.stopped:
            progress.stop()
    update_record_tables(run.config)


def encode_here(
    config: EncodeConfig, items: Sequence[WorkItem]
) -> Generator[TaskOutcome, None, None]:
    """Encode work items in this process, in their order but several at once."""
    waiting = iter(items)
    with closing(EncodeStage(config)) as stage:
        running: set[Future[TaskOutcome]] = set()
        while True:
            free = MAX_IN_FLIGHT - len(running)
            running |= {stage.submit(item) for item in islice(waiting, free)}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


@dataclass(frozen=True, slots=True)
class Workers:
    """The actors of a run: how many, and what each uses and asks of its node."""

    bounds: ActorBounds
    num_threads: int  # of torch
    num_decoders: int  # processes beside it
    num_cpus: float
    num_gpus: float


def choose_workers(
    nodes: Sequence[NodeSize],
    *,
    num_tasks: int,
    bounds: ActorBounds | None = None,
    num_threads: int | None = None,
    num_decoders: int | None = None,
    num_gpus: float | None = None,
) -> Workers:
    """Choose what is None from the nodes that are there, with no more actors than tasks.

    ``num_gpus`` becomes 1 where a node has any, ``bounds`` as many actors as there is room for: a
    pool that grows costs money, so it must be asked for. An actor's share of CPUs is a node's for
    each of its GPUs, on the node where that is least; without GPUs it is the most with which all
    actors find room. Half of a GPU's share decodes and a quarter is torch's; without GPUs all but
    one CPU is torch's. An actor asks for its threads and decoders, but for no more than its share,
    so that no GPU waits for a CPU.

    Raises:
        ValueError: no node can hold an actor, and nothing says what to wait for.
    """
    bounds = bounds and bounds.cap(num_tasks)
    if num_gpus is None:
        num_gpus = 1.0 if any(node.num_gpus >= 1 for node in nodes) else 0.0
    share = _find_share(nodes, bounds.min if bounds else None, num_gpus)
    if bounds is None and share is None:
        raise ValueError(
            f"actors: expected a node with {num_gpus:g} GPUs and a CPU, got {list(nodes)}; where "
            "the cluster's autoscaler is to start some, name --actors MIN:MAX and --gpus"
        )
    whole = int(share or 1)
    if num_decoders is None:
        num_decoders = max(1, min(MAX_DECODERS, whole // 2)) if num_gpus else 1
    if num_threads is None:
        num_threads = max(1, whole // 4 if num_gpus else whole - num_decoders)
    num_cpus = min(num_threads + num_decoders, share or 1)
    if bounds is None:
        room = sum(node.count_actors(num_cpus, num_gpus) for node in nodes)
        bounds = ActorBounds(room, room).cap(num_tasks)
    return Workers(bounds, num_threads, num_decoders, num_cpus, num_gpus)


def _find_share(nodes: Sequence[NodeSize], num_actors: int | None, num_gpus: float) -> float | None:
    """Return the CPUs that an actor may ask for, None where no node could hold one."""
    if num_gpus:
        held = [(node.num_cpus, node.count_actors(0, num_gpus)) for node in nodes]
        return min((cpus / count for cpus, count in held if count and cpus), default=None)
    most = int(max((node.num_cpus for node in nodes), default=0))
    if num_actors is None or most == 0:
        return 1 if most else None
    fitting = (
        share
        for share in range(most, 0, -1)
        if sum(node.count_actors(share, 0) for node in nodes) >= num_actors
    )
    return next(fitting, 1)


def _build_pool(config: EncodeConfig, workers: Workers) -> ActorPool:
    layer = (config.features or config.latents).folder
    config = replace(
        config,
        num_threads=workers.num_threads,
        num_decoders=workers.num_decoders,
        needs_gpu=workers.num_gpus > 0,
    )
    return ActorPool(
        # Ray's dashboard shows an actor by the name of its class.
        actor=type(f"ldznet encode {layer}", (_EncodeActor,), {"__module__": __name__}),
        name=f"ldznet_encode_{layer}",
        arguments=(config,),
        bounds=workers.bounds,
        in_flight=MAX_IN_FLIGHT,
        num_cpus=workers.num_cpus,
        num_gpus=workers.num_gpus,
    )


class _EncodeActor:
    """An encode stage as Ray Data calls it, from several threads at once."""

    def __init__(self, config: EncodeConfig) -> None:
        self._stage = EncodeStage(config)
        self._metrics = EncodeMetrics(config)
        self._node = find_node()
        end_on_sigterm(self._stage.close)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        try:
            outcome = self._stage.encode(unpack_item(batch))
            self._metrics.record(outcome)
            return pack_outcome(replace(outcome, ray_node=self._node))
        except StageClosedError:
            # SIGTERM. Ray would take an error for an answer, but tries again after a death.
            threading.Event().wait(2 * END_LIMIT_S)
            raise


def end_on_sigterm(close: Callable[[], None]) -> None:
    """Make SIGTERM call ``close`` and end this process, after ``END_LIMIT_S`` at most.

    Ray's own handler waits minutes for the calls that run, and a machine that is taken away is gone
    by then. To Ray this end is a crash: it starts the actor elsewhere and tries the calls again.
    To be called from the main thread, where Ray creates its actors.
    """

    def end() -> None:
        closing = threading.Thread(target=close, name="close", daemon=True)
        closing.start()
        closing.join(END_LIMIT_S)
        os._exit(1)

    def on_signal(*_: object) -> None:
        threading.Thread(target=end, name="end", daemon=True).start()

    signal.signal(signal.SIGTERM, on_signal)
