"""Scoring predictors on a store's pairs: a head, and what stands beside it.

Data flow: fixed batches of the pairs' numbers -> those that this worker takes, read ahead -> each
predictor's probabilities -> int64 sums, the same whoever computed which batch.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.head import Head
from models.metrics import Scores, SegmentationMetrics
from pipeline.reader import Batch, PairReader, move_inputs

Predictor = Callable[[Batch], Tensor]  # → probabilities (B, H, W) float32


@dataclass(frozen=True)
class ScoredRow:
    """One row of a results table."""

    name: str
    scores: Scores
    baseline: bool = False

    def figures(self) -> dict[str, float | int]:
        """Return the three metrics in [0, 1] and the number of pairs."""
        scores = self.scores
        return {
            "mIoU": scores.mIoU,
            "IoU_FG": scores.IoU_FG,
            "AP": scores.AP,
            "num_pairs": scores.num_pairs,
        }


def evaluation_draw(num_draws: int, draws: Sequence[int] | None = None) -> int:
    """Return the draw that evaluation reads: the middle one, t = 400 of 300, 400, 500.

    ``draws`` are those among which a head's training chose; None: all.
    """
    return num_draws // 2 if draws is None else sorted(draws)[len(draws) // 2]


def count_batches(num: int, batch: int) -> int:
    """Return how many batches some pairs are evaluated in, the last one perhaps smaller."""
    return -(-num // batch)


def iterate_batches(
    reader: PairReader,
    numbers: np.ndarray | range,
    *,
    batch: int,
    draw: int,
    which: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yield batches of pairs in order, the next one read while this one is used.

    Batch k is ``numbers[k * batch : (k + 1) * batch]``. ``which`` are those wanted; None: all.
    """

    def read(number: int) -> Batch:
        chosen = numbers[number * batch : (number + 1) * batch]
        return reader.read(chosen, draws=[draw] * len(chosen))

    wanted = range(count_batches(len(numbers), batch)) if which is None else which
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as pool:
        pending = [pool.submit(read, number) for number in wanted[:1]]
        for number in [*wanted[1:], None]:
            ready = pending.pop().result() if pending else None
            if number is not None:
                pending.append(pool.submit(read, number))
            if ready is not None:
                yield ready


@torch.inference_mode()
def predict(head: Head, batch: Batch, *, device: torch.device) -> Tensor:
    """Return foreground probabilities (B, H, W) float32 on the CPU."""
    logits = head(**move_inputs(batch.inputs, device))
    return torch.sigmoid(logits.float())[:, 0].cpu()


def count_pairs(
    predictors: Sequence[Predictor],
    reader: PairReader,
    numbers: np.ndarray | range,
    *,
    batch: int,
    draw: int,
    which: Sequence[int] | None = None,
    num_threads: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> list[SegmentationMetrics]:
    """Return each predictor's sums over the pairs of some batches.

    Every operation is computed by one thread of the CPU, ``num_threads`` batches at once: with how
    many threads a sum is split, its last digits change, and a pixel may change sides. So the
    figures are the same on any number of workers and cores (of one kind).

    Args:
        batch, which: As of ``iterate_batches``: the pairs of a batch are computed together.
        draw: The stored draw that is read of each pair.
        num_threads: Batches in memory at once, and two more.
        on_batch: Hears how many pairs are done; what it raises ends the work.
    """
    totals = [SegmentationMetrics() for _ in predictors]
    pending: deque[Future[list[SegmentationMetrics]]] = deque()
    done = 0

    def count(pairs: Batch) -> list[SegmentationMetrics]:
        found = [SegmentationMetrics() for _ in predictors]
        for metrics, predictor in zip(found, predictors, strict=True):
            metrics.add(predictor(pairs), pairs.mask)
        return found

    def add(found: list[SegmentationMetrics]) -> None:
        nonlocal done
        for total, metrics in zip(totals, found, strict=True):
            total.merge(metrics)
        done += int(found[0].state()["num_pairs"])
        if on_batch is not None:
            on_batch(done)

    with _one_thread_each(), ThreadPoolExecutor(num_threads, "score") as pool:
        for pairs in iterate_batches(reader, numbers, batch=batch, draw=draw, which=which):
            pending.append(pool.submit(count, pairs))
            if len(pending) >= num_threads:
                add(pending.popleft().result())
        while pending:
            add(pending.popleft().result())
    return totals


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Have torch compute on the thread that asks; threads started inside take it over."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count_threads(device: torch.device) -> int:
    """Return how many batches to compute at once: as torch's threads on a CPU, else one."""
    return torch.get_num_threads() if device.type == "cpu" else 1
