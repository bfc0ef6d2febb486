"""Validation during training: the workers share the batches and add up their sums."""

import functools
from collections.abc import Callable

import torch

from models.heads.head import Head
from models.heads.metrics import SegmentationMetrics
from pipeline.evaluate.scoring import (
    BATCH_SIZE,
    FIGURE_NAMES,
    choose_pairs,
    count_pairs,
    count_threads,
    evaluation_draw,
    list_false_answers,
    predict,
)
from pipeline.read.order import count_steps
from pipeline.read.reader import PairReader
from pipeline.runs.config import TrainConfig
from pipeline.train.data import Worker


class _StoppedError(Exception):
    """This worker was asked to end."""


class Validation:
    """Scores a head on a fixed random choice of ``validation_pairs`` validation pairs.

    With ``negatives`` also on as many of those.
    """

    def __init__(
        self,
        config: TrainConfig,
        reader: PairReader,
        worker: Worker,
        *,
        negatives: PairReader | None = None,
    ) -> None:
        self._num_pairs, self._negatives = config.validation_pairs, negatives
        self.draw = evaluation_draw(config.data.draws or range(reader.num_draws))
        self.reader, self._worker = reader, worker

    def score(self, head: Head, *, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Return ``FIGURE_NAMES`` by name, or None if a worker was asked to end meanwhile.

        With negatives also ``list_false_answers``. All workers must call it together, and all get
        the same.
        """
        metrics = self._count(head, self.reader, should_stop)
        if metrics is None:
            return None
        scores = metrics.compute()
        figures = {name: getattr(scores, name) for name in FIGURE_NAMES}
        if self._negatives is not None:
            found = self._count(head, self._negatives, should_stop)
            if found is None:
                return None
            figures |= list_false_answers(found, scores)
        return figures

    def _count(
        self, head: Head, reader: PairReader, should_stop: Callable[[], bool]
    ) -> SegmentationMetrics | None:
        """Return the workers' sums over a reader's pairs, or None if one was asked to end."""
        numbers, worker = choose_pairs(len(reader), self._num_pairs), self._worker
        num_batches = count_steps(len(numbers), BATCH_SIZE)

        def check(num_done: int) -> None:
            if should_stop():
                raise _StoppedError

        metrics, stopped = SegmentationMetrics(), False
        try:
            (metrics,) = count_pairs(
                [functools.partial(predict, head, device=self._worker.device)],
                reader,
                numbers,
                batch_size=BATCH_SIZE,
                draw=self.draw,
                which=range(worker.rank, num_batches, worker.num_workers),
                num_threads=count_threads(self._worker.device),
                on_batch=check,
            )
        except _StoppedError:
            stopped = True
        if self._worker.num_workers > 1:
            device = self._worker.device
            votes = torch.tensor(int(stopped), device=device)
            state = {name: value.to(device) for name, value in metrics.state().items()}
            for value in (*state.values(), votes):
                torch.distributed.all_reduce(value)
            metrics, stopped = SegmentationMetrics.from_state(state), bool(votes)
        return None if stopped else metrics
