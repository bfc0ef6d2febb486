"""Evaluation on several Ray actors: each is given the next few batches until none is left."""

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
from pipeline.evaluate.pair_scorer import PairScorer, ScoringJob
from pipeline.read.order import count_steps

BATCHES_A_CALL = 8  # what is lost with a worker
MAX_TRIES = 3  # of a call whose worker died
START_LIMIT_S = 600.0  # for room for the first worker: an autoscaler's node takes minutes


class _ScoringActor:
    """One process, with one GPU where there are GPUs."""

    def __init__(self, job: ScoringJob, head: Head, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._job, self._head = job, head

    @cached_property
    def _scorer(self) -> PairScorer:
        """Opened by the first ``count``, since it may take long and ``start`` must not."""
        return PairScorer(self._job, self._head)

    def start(self) -> None:
        """Return once the cluster has room for this worker."""

    def count(self, first: int, end: int) -> list[dict[str, torch.Tensor]]:
        """Return each row's metric state over the batches [first, end)."""
        return [metrics.state() for metrics in self._scorer.count(range(first, end))]


def count_on_workers(
    job: ScoringJob,
    head: Head,
    num_pairs: int,
    *,
    num_workers: int,
    on_pairs: Callable[[int], None],
) -> list[SegmentationMetrics]:
    """Return each row's sums over all pairs; ``on_pairs`` is called with the number of pairs done.

    The sums are integers and a batch is computed whole, so who computes it changes nothing. As soon
    as one worker has started, the others are not waited for: the cluster may have no room for them.

    Raises:
        ValueError: the cluster has fewer GPUs than workers.
        RuntimeError: no worker started in ``START_LIMIT_S``.
        ray.exceptions.RayError: a worker failed, or died ``MAX_TRIES`` times.
    """
    with ray_running(num_cpus=max(num_workers, os.cpu_count() or 1) + SPARE_CPUS):
        num_gpus = count_gpus()
        if 0 < num_gpus < num_workers:
            raise ValueError(
                f"--workers: expected at most {num_gpus}, the cluster's GPUs, got {num_workers}"
            )
        num_cpus = max(1, count_cores() // num_workers)
        kind = ray.remote(_ScoringActor).options(
            num_cpus=num_cpus,
            num_gpus=1 if num_gpus else 0,
            max_restarts=-1,
            max_task_retries=MAX_TRIES,
        )
        shared = ray.put(head)
        workers = [kind.remote(job, shared, num_cpus) for _ in range(num_workers)]
        return _collect(workers, count_steps(num_pairs, job.batch_size), on_pairs)


def _collect(
    workers: Sequence[Any], num_batches: int, on_pairs: Callable[[int], None]
) -> list[SegmentationMetrics]:
    """Give each started worker the next batches whenever it is idle, and add up the sums."""
    size = min(BATCHES_A_CALL, -(-num_batches // len(workers)))
    left = deque(range(0, num_batches, size))
    starting = {worker.start.remote(): worker for worker in workers}
    if not ray.wait(list(starting), timeout=START_LIMIT_S)[0]:
        free, there = ray.available_resources(), ray.cluster_resources()
        room = ", ".join(f"{free.get(x, 0):g} of {there.get(x, 0):g} {x}s" for x in ("CPU", "GPU"))
        raise RuntimeError(
            f"--workers: none of {len(workers)} workers found room on the cluster in "
            f"{START_LIMIT_S:g} s; free are {room}. Wait for what runs there, add nodes, or leave "
            "--workers out to score here"
        )
    idle, busy = deque[Any](), dict[Any, Any]()
    totals: list[SegmentationMetrics] = []
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
        totals = totals or [SegmentationMetrics() for _ in found]
        for total, state in zip(totals, found, strict=True):
            total.merge(SegmentationMetrics.from_state(state))
        on_pairs(int(totals[0].state()["num_pairs"]))
    return totals
