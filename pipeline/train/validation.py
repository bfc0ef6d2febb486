"""Validation during training: the workers share the batches and add up their sums."""

import functools
from collections.abc import Callable

import torch

from models.heads.head import Head
from models.heads.metrics import SegmentationMetrics
from pipeline.evaluate.scoring import (
    BATCH_SIZE,
    METRIC_NAMES,
    choose_pairs,
    count_pairs,
    count_threads,
    evaluation_draw,
    list_figures,
    predict,
)
from pipeline.read.order import count_steps
from pipeline.read.reader import PairReader
from pipeline.runs.config import TrainConfig
from pipeline.train.data import Worker


class _StoppedError(Exception):
    """This worker was asked to end."""


class Validation:
    """Scores a head on a fixed random choice of ``validation_pairs`` validation pairs."""

    def __init__(self, config: TrainConfig, reader: PairReader, worker: Worker) -> None:
        self._numbers = choose_pairs(len(reader), config.validation_pairs)
        num_batches = count_steps(len(self._numbers), BATCH_SIZE)
        self._which = range(worker.rank, num_batches, worker.num_workers)
        self.draw = evaluation_draw(config.data.draws or range(reader.num_draws))
        self.reader, self._worker = reader, worker

    def score(self, head: Head, *, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Return mIoU, IoU_FG and AP in [0, 1], or None if a worker was asked to end meanwhile.

        All workers must call it together, and all get the same.
        """

        def check(num_done: int) -> None:
            if should_stop():
                raise _StoppedError

        metrics, stopped = SegmentationMetrics(), False
        try:
            (metrics,) = count_pairs(
                [functools.partial(predict, head, device=self._worker.device)],
                self.reader,
                self._numbers,
                batch_size=BATCH_SIZE,
                draw=self.draw,
                which=self._which,
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
        if stopped:
            return None
        figures = list_figures(metrics.compute())
        return {name: figures[name] for name in METRIC_NAMES}
