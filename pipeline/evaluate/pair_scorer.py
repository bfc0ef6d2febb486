"""A picklable scoring job and its runner."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from models.heads.head import Head
from models.heads.metrics import SegmentationMetrics
from pipeline.base.machine import choose_device
from pipeline.base.yaml import SpecError
from pipeline.evaluate.baselines import BASELINES, MeanMasks, predict_foreground, sample_tasks
from pipeline.evaluate.phrasecut import Annotations, NativeMasks
from pipeline.evaluate.scoring import (
    Predictor,
    choose_pairs,
    count_pairs,
    count_threads,
    evaluation_draw,
    predict,
)
from pipeline.read.choice import PairChoice
from pipeline.read.reader import PairReader
from pipeline.read.source import Source
from pipeline.runs.config import DataConfig, list_draws

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoringJob:
    """Which pairs are scored, and how. It can be sent to another process."""

    source: Source
    data: DataConfig  # of the head's training: the draws it read, and the pairs of the mean masks
    tasks: str  # glob over task ids
    choice: PairChoice  # of those tasks' pairs
    batch_size: int  # pairs computed together
    limit: int | None  # a fixed random choice of so many pairs; None: all
    option: str = "data.validation"  # that names the tasks, for errors
    negatives: bool = False  # the negatives among those pairs, not the others
    model: str | None = None  # the LDM's folder, as of ``PairReader``
    annotations: Annotations | None = None  # PhraseCut's, for its evaluator's figures too


class PairScorer:
    """Scores a head, the baselines, or both, on any of a job's batches."""

    def __init__(self, job: ScoringJob, head: Head | None, *, baselines: bool = True) -> None:
        """Open the readers; SpecError where the store lacks such pairs, or what the head reads."""
        self._job, self._head, self._baselines = job, head, baselines
        self._device = choose_device(None if head else "cpu")
        inputs = head.reads if head else frozenset()
        choice = job.choice.narrow_to_negatives() if job.negatives else job.choice
        self.reader = PairReader(
            job.source,
            tasks=job.tasks,
            option=job.option,
            inputs=inputs,
            blocks=tuple(head.feature_channels) if head else (),
            choice=choice,
            device=self._device,
            negatives=job.negatives,
            model=job.model,
        )
        features = job.source.features if "features" in inputs else None
        self._draw = evaluation_draw(list_draws(job.data, features))
        self.numbers = choose_pairs(len(self.reader), job.limit)
        self._train = self._open_training_masks() if baselines else None
        self.names = (*([head.name] if head else []), *(BASELINES if baselines else ()))
        if baselines and self._train is None:
            self.names = self.names[:-1]
        self._native: NativeMasks | None = None
        if job.annotations is not None:
            spec = job.source.latents.latents
            self._native = NativeMasks(job.annotations, spec, self.reader.read_columns)

    def _open_training_masks(self) -> PairReader | None:
        """Open the pairs of the mean masks; beside a head, None and a warning if there are none."""
        data = self._job.data
        try:
            return PairReader(
                self._job.source,
                tasks=data.train,
                option="data.train",
                inputs=frozenset(),
                choice=data.train_filter,
                negatives=False,
            )
        except SpecError as error:
            if self._head is None:
                raise
            logger.warning(
                "no training pairs are here, so the row %r is left out; the other rows stand (%s)",
                *(BASELINES[-1], str(error).split(". A task's id")[0]),
            )
            return None

    def count(
        self, which: Sequence[int] | None, *, on_batch: Callable[[int], None] | None = None
    ) -> list[SegmentationMetrics]:
        """Return the sums over some batches, None for all, in the order of ``names``.

        With annotations those at the images' own size follow, in the same order.
        ``on_batch`` is as of ``count_pairs``.
        """
        return count_pairs(
            self._predictors,
            self.reader,
            self.numbers,
            batch_size=self._job.batch_size,
            draw=self._draw,
            which=which,
            num_threads=count_threads(self._device),
            on_batch=on_batch,
            native=self._native,
        )

    @cached_property
    def _predictors(self) -> list[Predictor]:
        """Built where the pairs are scored: other processes need no head on their GPU."""
        found: list[Predictor] = []
        if self._head is not None:
            found.append(partial(predict, self._head.to(self._device), device=self._device))
        if self._baselines:
            found.append(predict_foreground)
        if self._train is not None:
            choice = self._job.data.train_filter
            train = sample_tasks(self._job.source, self._train, choice=choice, negatives=False)
            found.append(MeanMasks(train))
        return found
