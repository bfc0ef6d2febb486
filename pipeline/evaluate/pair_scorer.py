"""What a process needs to score a head on a store's pairs, and the sums that it finds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch

from models.heads.head import Head
from models.heads.metrics import SegmentationMetrics
from pipeline.evaluate.baselines import (
    BASELINE_FOREGROUND,
    BASELINE_MEAN_MASK,
    MeanMasks,
    predict_foreground,
    sample_tasks,
)
from pipeline.evaluate.scoring import (
    Predictor,
    count_pairs,
    count_threads,
    evaluation_draw,
    predict,
)
from pipeline.read.choice import PairChoice
from pipeline.read.order import shuffle_positions
from pipeline.read.reader import PairReader
from pipeline.read.source import Source
from pipeline.runs.config import DataConfig, list_draws

ROWS = (BASELINE_FOREGROUND, BASELINE_MEAN_MASK)  # after the head's own


@dataclass(frozen=True)
class Scoring:
    """Which pairs a head is scored on, and how. Can be sent to another process."""

    source: Source
    data: DataConfig  # of the head's training: its draws, and the pairs of the mean masks
    tasks: str  # glob over task ids
    choice: PairChoice  # of those tasks' pairs
    blocks: tuple[int, ...]
    batch: int  # pairs computed together
    limit: int | None  # a fixed random choice of so many pairs; None: all


class PairScorer:
    """Scores a head beside the two rows that need none, on any of the fixed batches."""

    def __init__(self, scoring: Scoring, head: Head, *, baselines: bool = True) -> None:
        """Open the readers; without ``baselines`` the head alone is scored.

        Raises:
            SpecError: the store lacks what the head reads, or holds no such pairs.
        """
        source, data = scoring.source, scoring.data
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._head, self._batch, self._baselines = head, scoring.batch, baselines
        self._reader = PairReader(
            source,
            tasks=scoring.tasks,
            inputs=head.inputs,
            blocks=scoring.blocks,
            choice=scoring.choice,
            device=self._device,
        )
        self._draw = 0
        if "features" in head.inputs:
            assert source.features is not None
            num_draws = self._reader.num_draws
            draws = list_draws(data, num_draws, where=source.features.folder)
            self._draw = evaluation_draw(num_draws, draws)
        self._source, self._data = source, data
        self._train = PairReader(
            source, tasks=data.train, inputs=frozenset(), choice=data.train_filter
        )
        self.numbers = choose_pairs(len(self._reader), scoring.limit)

    def count(
        self, which: Sequence[int] | None, *, on_batch: Callable[[int], None] | None = None
    ) -> list[SegmentationMetrics]:
        """Return the sums of the head, and of ``ROWS``, over some batches; None: all."""
        return count_pairs(
            self._predictors,
            self._reader,
            self.numbers,
            batch=self._batch,
            draw=self._draw,
            which=which,
            num_threads=count_threads(self._device),
            on_batch=on_batch,
        )

    @cached_property
    def _predictors(self) -> list[Predictor]:
        """Made by the process that scores: another has no use for a head on its GPU."""
        head = partial(predict, self._head.to(self._device), device=self._device)
        if not self._baselines:
            return [head]
        train = sample_tasks(self._source, self._train, choice=self._data.train_filter)
        return [head, predict_foreground, MeanMasks(train)]


def choose_pairs(num: int, limit: int | None) -> np.ndarray | range:
    """Return the numbers of all pairs, or of a fixed random ``limit`` of them, ascending."""
    if limit is None or limit >= num:
        return range(num)
    return np.sort(shuffle_positions(np.arange(limit), num=num, seed=0, epoch=0))
