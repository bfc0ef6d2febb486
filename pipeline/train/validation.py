"""The validation of a training run: its workers share the batches and add up what they counted."""

import functools
from collections.abc import Callable

import numpy as np
import torch

from models.heads.head import Head
from models.heads.metrics import SegmentationMetrics
from pipeline.evaluate.scoring import (
    count_batches,
    count_pairs,
    count_threads,
    evaluation_draw,
    predict,
)
from pipeline.read.order import shuffle_positions
from pipeline.read.reader import PairReader
from pipeline.runs.config import TrainConfig

BATCH = 32  # pairs computed together


class _LeftError(Exception):
    """This worker was asked to end."""


class Validation:
    """Scores a head on the first pairs of the validation order, the same ones each time."""

    def __init__(
        self,
        config: TrainConfig,
        reader: PairReader,
        *,
        device: torch.device,
        rank: int,
        num_workers: int,
        batch: int = BATCH,
    ) -> None:
        num = len(reader)
        positions = np.arange(min(num, config.validation_pairs))
        self._numbers = np.sort(shuffle_positions(positions, num=num, seed=0, epoch=0))
        self._which = range(rank, count_batches(len(self._numbers), batch), num_workers)
        self.draw = evaluation_draw(reader.num_draws, config.data.draws)
        self._reader, self._batch = reader, batch
        self._device, self._num_workers = device, num_workers

    def score(self, head: Head, *, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Return mIoU, IoU_FG and AP; None where a worker was asked to end before it had them.

        All workers call it together and all get the same.
        """

        def check(num_done: int) -> None:
            if should_stop():
                raise _LeftError

        metrics, left = SegmentationMetrics(), False
        try:
            (metrics,) = count_pairs(
                [functools.partial(predict, head, device=self._device)],
                self._reader,
                self._numbers,
                batch=self._batch,
                draw=self.draw,
                which=self._which,
                num_threads=count_threads(self._device),
                on_batch=check,
            )
        except _LeftError:
            left = True
        metrics, left = self._sum_over_workers(metrics, left)
        if left:
            return None
        scores = metrics.compute()
        return {"mIoU": scores.mIoU, "IoU_FG": scores.IoU_FG, "AP": scores.AP}

    def _sum_over_workers(
        self, metrics: SegmentationMetrics, left: bool
    ) -> tuple[SegmentationMetrics, bool]:
        if self._num_workers == 1:
            return metrics, left
        state = metrics.state()
        sizes = [value.numel() for value in state.values()]
        flat = torch.cat([value.flatten() for value in state.values()] + [torch.tensor([left])])
        flat = flat.to(self._device)
        torch.distributed.all_reduce(flat)
        *parts, votes = flat.cpu().split([*sizes, 1])
        total = {
            name: part.reshape(state[name].shape) for name, part in zip(state, parts, strict=True)
        }
        return SegmentationMetrics.from_state(total), bool(votes)
