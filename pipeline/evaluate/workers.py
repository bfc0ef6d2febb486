"""Evaluation on several workers of Ray: each takes the next few batches until none is left."""

import os
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import ray
import torch

from models.heads.head import Head
from models.heads.metrics import SegmentationMetrics
from pipeline.base.ray_cluster import SPARE_CPUS, count_cores, count_gpus, ray_running
from pipeline.evaluate.pair_scorer import ROWS, PairScorer, Scoring
from pipeline.evaluate.scoring import count_batches

BATCHES = 8  # asked of a worker at once: what a lost one loses
MAX_TRIES = 3  # of a piece of work whose worker died
START_LIMIT_S = 600.0  # for room for the first worker: an autoscaler's node takes minutes


class _Worker:
    """One process, and where there are GPUs one GPU."""

    def __init__(self, scoring: Scoring, head: Head, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._scoring, self._head = scoring, head

    @cached_property
    def _scorer(self) -> PairScorer:
        """Opened with the first work, which may take long: starting tells of room alone."""
        return PairScorer(self._scoring, self._head)

    def start(self) -> None:
        """Answer: the cluster has room for this worker."""

    def count(self, first: int, end: int) -> list[dict[str, torch.Tensor]]:
        """Return the states of all rows over the batches [first, end)."""
        return [metrics.state() for metrics in self._scorer.count(range(first, end))]


def count_on_workers(
    scoring: Scoring,
    head: Head,
    num_pairs: int,
    *,
    num_workers: int,
    on_pairs: Callable[[int], None],
) -> list[SegmentationMetrics]:
    """Return the sums of all rows over all pairs; ``on_pairs`` hears how many are done.

    Sums are integers and a batch is computed whole, so who computes it does not matter. Workers for
    which the cluster has no room are not waited for once there is one that works.

    Raises:
        ValueError: the cluster has fewer GPUs than workers.
        RuntimeError: no worker started in ``START_LIMIT_S``.
        ray.exceptions.RayError: a worker failed, or died ``MAX_TRIES`` times.
    """
    num_batches = count_batches(num_pairs, scoring.batch)
    num_cores = os.cpu_count() or 1
    with ray_running(num_cpus=max(num_workers, num_cores) + SPARE_CPUS):
        num_gpus = count_gpus()
        if 0 < num_gpus < num_workers:
            raise ValueError(
                f"--workers: expected at most {num_gpus}, the cluster's GPUs, got {num_workers}"
            )
        num_cpus = max(1, count_cores() // num_workers)
        kind = ray.remote(_Worker).options(
            num_cpus=num_cpus,
            num_gpus=1 if num_gpus else 0,
            max_restarts=-1,
            max_task_retries=MAX_TRIES,
        )
        shared = ray.put(head)
        workers = [kind.remote(scoring, shared, num_cpus) for _ in range(num_workers)]
        return _collect(workers, num_batches, on_pairs)


def _collect(
    workers: Sequence[Any], num_batches: int, on_pairs: Callable[[int], None]
) -> list[SegmentationMetrics]:
    """Give every worker that answered the next batches whenever it is done with some, and add up.

    Nothing is given to the others: what waits for room that a cluster has not would never be done.
    """
    size = min(BATCHES, -(-num_batches // len(workers)))
    left = deque(range(0, num_batches, size))
    starting = {worker.start.remote(): worker for worker in workers}
    _wait_for_first(list(starting))
    idle, busy = deque[Any](), dict[Any, Any]()
    totals = [SegmentationMetrics() for _ in range(1 + len(ROWS))]
    while left or busy:
        while left and idle:
            first, worker = left.popleft(), idle.popleft()
            busy[worker.count.remote(first, min(first + size, num_batches))] = worker
        ready = ray.wait([*busy, *starting])[0][0]
        found = ray.get(ready)
        if ready in starting:
            idle.append(starting.pop(ready))
            continue
        idle.append(busy.pop(ready))
        for total, state in zip(totals, found, strict=True):
            total.merge(SegmentationMetrics.from_state(state))
        on_pairs(int(totals[0].state()["num_pairs"]))
    return totals


def _wait_for_first(started: list[Any]) -> None:
    """Wait for the first worker to answer."""
    if ray.wait(started, timeout=START_LIMIT_S)[0]:
        return
    free, there = ray.available_resources(), ray.cluster_resources()
    room = ", ".join(f"{free.get(x, 0):g} of {there.get(x, 0):g} {x}s" for x in ("CPU", "GPU"))
    raise RuntimeError(
        f"--workers: none of {len(started)} workers found room on the cluster in "
        f"{START_LIMIT_S:g} s; free are {room}. Wait for what runs there, add nodes, or leave "
        "--workers out to score here"
    )
