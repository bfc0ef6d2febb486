"""Scoring predictors on a store's pairs: a head, and what stands beside it.

Data flow: fixed batches of the pairs' numbers -> those that this worker takes, read ahead -> each
predictor's probabilities -> int64 sums, the same whoever computed which batch.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.heads.head import Head
from models.heads.metrics import Scores, SegmentationMetrics
from pipeline.read.batch import Batch, QuantizedFeature, move_inputs
from pipeline.read.reader import PairReader

Predictor = Callable[[Batch], Tensor]  # → probabilities (B, H, W) float32
MAX_AT_ONCE = 16  # batches: forward passes keep far more than a batch's bytes between layers
AT_ONCE_BYTES = 4 * 2**30  # of the inputs and masks of the batches computed at once


@dataclass(frozen=True)
class ScoredRow:
    """One row of a results table."""

    name: str
    scores: Scores
    baseline: bool = False
    snapshot: str | None = None  # of the commits whose pairs were scored

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
) -> Generator[Batch]:
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

    Every operation is computed by one thread of the CPU, several batches at once: with how many
    threads a sum is split, its last digits change, and a pixel may change sides. So the figures are
    the same on any number of workers and cores (of one kind).

    Args:
        batch, which: As of ``iterate_batches``: the pairs of a batch are computed together.
        draw: The stored draw that is read of each pair.
        num_threads: Most batches computed at once, ``count_at_once``; two more are in memory.
        on_batch: Hears how many pairs are done; what it raises ends the work.
    """
    sums = _Sums(predictors, on_batch)
    pending: deque[Future[list[SegmentationMetrics]]] = deque()
    batches = iterate_batches(reader, numbers, batch=batch, draw=draw, which=which)
    with (
        one_thread_each(),
        ThreadPoolExecutor(num_threads, "score") as pool,
        sums.stopping(),
        closing(batches),
    ):
        for pairs in batches:
            pending.append(pool.submit(sums.count, pairs))
            if len(pending) >= count_at_once(pairs, num_threads):
                sums.add(pending.popleft().result())
        while pending:
            sums.add(pending.popleft().result())
    return sums.totals


class _Sums:
    """Each predictor's sums so far; threads count batches, one adds up what they found."""

    def __init__(
        self, predictors: Sequence[Predictor], on_batch: Callable[[int], None] | None
    ) -> None:
        self.totals = [SegmentationMetrics() for _ in predictors]
        self._predictors, self._on_batch = predictors, on_batch
        self._num_done = 0
        self._stopped = threading.Event()

    def count(self, pairs: Batch) -> list[SegmentationMetrics]:
        """Return the sums over a batch; of an ended evaluation those that it had got to."""
        found = [SegmentationMetrics() for _ in self._predictors]
        for metrics, predictor in zip(found, self._predictors, strict=True):
            if self._stopped.is_set():
                break
            metrics.add(predictor(pairs), pairs.mask)
        return found

    def add(self, found: list[SegmentationMetrics]) -> None:
        for total, metrics in zip(self.totals, found, strict=True):
            total.merge(metrics)
        self._num_done += int(found[0].state()["num_pairs"])
        if self._on_batch is not None:
            self._on_batch(self._num_done)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Have batches that are still counted end soon once the work has: nobody adds them up."""
        try:
            yield
        finally:
            self._stopped.set()


def count_at_once(pairs: Batch, most: int) -> int:
    """Return how many batches like this one to compute at once, 1 to ``most``."""
    each = 3 * pairs.mask.nbytes + sum(_count_bytes(value) for value in pairs.inputs.values())
    return max(1, min(most, AT_ONCE_BYTES // max(1, each)))


def _count_bytes(value: Any) -> int:
    """Return the bytes of an input as it is stored and as float32, whatever it is nested in."""
    if isinstance(value, Mapping):
        return sum(_count_bytes(each) for each in value.values())
    if isinstance(value, QuantizedFeature):
        return _count_bytes(value.values)
    return int(value.nbytes) + 4 * int(value.numel())


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Have torch compute on the thread that asks; threads started inside take it over."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count_threads(device: torch.device) -> int:
    """Return how many batches to compute at once at most: as torch's threads on a CPU, else one."""
    return min(torch.get_num_threads(), MAX_AT_ONCE) if device.type == "cpu" else 1
