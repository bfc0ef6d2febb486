"""Scoring of predictors on a store's pairs.

Data flow: the pairs' numbers, cut into fixed batches -> this worker's batches, read ahead -> each
predictor's probabilities -> int64 sums, which do not depend on who computed which batch.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.heads.head import Head
from models.heads.metrics import Scores, SegmentationMetrics
from pipeline.evaluate.phrasecut import NativeMasks
from pipeline.read.batch import PairBatch, QuantizedFeature, move_inputs
from pipeline.read.order import count_steps, shuffle_positions
from pipeline.read.reader import PairReader

Predictor = Callable[[PairBatch], Tensor]  # → probabilities (B, H, W) float32
METRIC_NAMES = ("mIoU", "IoU_FG", "AP")  # fields of Scores that every table shows
FIGURE_NAMES = (*METRIC_NAMES, "AP_clipseg", "mIoU_threshold", "IoU_FG_threshold")
BATCH_SIZE = 32  # pairs computed together; the figures depend on it in their last digits
MAX_AT_ONCE = 16  # batches: forward passes keep far more than a batch's bytes between layers
AT_ONCE_BYTES = 4 * 2**30  # of the inputs and masks of the batches computed at once


@dataclass(frozen=True)
class ScoredRow:
    """One row of a results table."""

    name: str
    scores: Scores
    baseline: bool = False
    snapshot: str | None = None  # digest of the snapshot whose pairs were scored
    negatives: Mapping[str, float] = field(
        default_factory=dict
    )  # ``list_false_answers``, where asked for
    official: Mapping[str, float] = field(default_factory=dict)  # PhraseCut's, where asked for


def list_false_answers(negatives: SegmentationMetrics, scores: Scores) -> dict[str, float]:
    """Return the shares of negative pairs with a false answer, and ``num_negatives``.

    An answer is any pixel over the threshold: 0.5 for ``false_answers``, and for
    ``false_answers_best`` the one at which mIoU is best, of the pairs that are not negative.
    """
    return {
        "false_answers": negatives.share_answered(0.5),
        "false_answers_best": negatives.share_answered(scores.mIoU_threshold),
        "num_negatives": int(negatives.state()["num_pairs"]),
    }


def evaluation_draw(draws: Sequence[int]) -> int:
    """Return the middle one of the draws that a head was trained on: t = 400 of 300, 400, 500."""
    return sorted(draws)[len(draws) // 2]


def choose_pairs(num: int, limit: int | None) -> np.ndarray | range:
    """Return the numbers of all pairs, or of a fixed random ``limit`` of them, ascending."""
    if limit is None or limit >= num:
        return range(num)
    return np.sort(shuffle_positions(np.arange(limit), num=num, seed=0, epoch=0))


def iterate_batches(
    reader: PairReader,
    numbers: np.ndarray | range,
    *,
    batch_size: int,
    draw: int,
    which: Sequence[int] | None = None,
) -> Generator[PairBatch]:
    """Yield batches of pairs in order, each next one read while this one is used.

    Batch k is ``numbers[k * batch_size : (k + 1) * batch_size]``; ``which`` lists the batches to
    yield, None for all.
    """

    def read(number: int) -> PairBatch:
        chosen = numbers[number * batch_size : (number + 1) * batch_size]
        return reader.read(chosen, draws=[draw] * len(chosen))

    pending: deque[Future[PairBatch]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as pool:
        for number in range(count_steps(len(numbers), batch_size)) if which is None else which:
            pending.append(pool.submit(read, number))
            if len(pending) > 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@torch.inference_mode()
def predict(head: Head, batch: PairBatch, *, device: torch.device) -> Tensor:
    """Return foreground probabilities (B, H, W) float32 on the CPU."""
    logits = head(**move_inputs(batch.inputs, device))
    return torch.sigmoid(logits.float())[:, 0].cpu()


def count_pairs(
    predictors: Sequence[Predictor],
    reader: PairReader,
    numbers: np.ndarray | range,
    *,
    batch_size: int,
    draw: int,
    which: Sequence[int] | None = None,
    num_threads: int = 1,
    on_batch: Callable[[int], None] | None = None,
    native: NativeMasks | None = None,
) -> list[SegmentationMetrics]:
    """Return each predictor's sums over the pairs of some batches.

    With ``native`` each predictor's sums at the images' own size follow, without an added pixel.

    On a CPU several batches are computed at once, each by one thread. The number of threads that
    share a sum would change its last digits, and so may change the side of the threshold on which
    a pixel lies. So the figures are the same on any number of workers and cores (of one kind).

    Args:
        batch_size, which: As of ``iterate_batches``; the pairs of a batch are computed together.
        draw: The stored draw that is read of each pair.
        num_threads: Most batches computed at once, see ``count_at_once``; two more are in memory.
        on_batch: Called with the number of pairs done; an exception that it raises ends the work.
    """
    order = range(count_steps(len(numbers), batch_size)) if which is None else which
    totals = [SegmentationMetrics() for _ in predictors for _ in range(1 if native is None else 2)]
    stopped = threading.Event()

    def count(batch: PairBatch, number: int) -> list[SegmentationMetrics]:
        """Return each predictor's sums over a batch; those left when the work ends are empty."""
        found = [SegmentationMetrics() for _ in predictors]
        whole = [] if native is None else [SegmentationMetrics(added_px=0) for _ in predictors]
        chosen = numbers[number * batch_size : (number + 1) * batch_size]
        truths = [] if native is None else native.draw(chosen)
        for place, predictor in enumerate(predictors):
            if not stopped.is_set():
                probability_BHW = predictor(batch)
                found[place].add(probability_BHW, batch.truth, batch.ignore)
                if native is not None:
                    native.add(whole[place], chosen, truths, probability_BHW)
        return found + whole

    def add(found: list[SegmentationMetrics]) -> None:
        for total, metrics in zip(totals, found, strict=True):
            total.merge(metrics)
        if on_batch is not None:
            on_batch(int(totals[0].state()["num_pairs"]))

    pending: deque[Future[list[SegmentationMetrics]]] = deque()
    batches = iterate_batches(reader, numbers, batch_size=batch_size, draw=draw, which=order)
    with one_thread_each(), ThreadPoolExecutor(num_threads, "score") as pool, closing(batches):
        try:
            for number, batch in zip(order, batches, strict=True):
                pending.append(pool.submit(count, batch, number))
                if len(pending) >= count_at_once(batch, num_threads):
                    add(pending.popleft().result())
            while pending:
                add(pending.popleft().result())
        finally:
            stopped.set()
    return totals


def count_at_once(batch: PairBatch, most: int) -> int:
    """Return how many batches of this size to compute at once, 1 to ``most``."""
    each = 3 * batch.truth.nbytes + sum(_count_bytes(value) for value in batch.inputs.values())
    return max(1, min(most, AT_ONCE_BYTES // max(1, each)))


def _count_bytes(value: Any) -> int:
    """Return the bytes of an input as stored and as float32 together, over nested mappings."""
    if isinstance(value, Mapping):
        return sum(_count_bytes(each) for each in value.values())
    if isinstance(value, QuantizedFeature):
        return _count_bytes(value.values)
    return int(value.nbytes) + 4 * int(value.numel())


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Have torch compute each operation on one thread, also in threads started inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count_threads(device: torch.device) -> int:
    """Return the most batches to compute at once: torch's number of threads on a CPU, else one."""
    return min(torch.get_num_threads(), MAX_AT_ONCE) if device.type == "cpu" else 1
