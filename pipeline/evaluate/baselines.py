"""Two predictors without a head: everything foreground, and each phrase's mean training mask."""

from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.base.lru_cache import LruCache
from pipeline.read.batch import PairBatch
from pipeline.read.choice import PairChoice
from pipeline.read.order import shuffle_positions
from pipeline.read.reader import PairReader
from pipeline.read.source import Source
from pipeline.store.snapshot import Snapshot

NUM_TASKS = 256  # some 100,000 pairs: their mean has a standard error of 0.3 % of the deviation
PHRASE_MASKS = 200  # training masks averaged for a phrase, at most: a fixed choice
CACHE_BYTES = 256 * 2**20  # of mean masks: some 450 of 384 px
BASELINE_FOREGROUND = "everything foreground"
BASELINE_MEAN_MASK = "phrase's mean training mask"
BASELINES = (BASELINE_FOREGROUND, BASELINE_MEAN_MASK)  # in the order of a table's rows


def predict_foreground(batch: PairBatch) -> Tensor:
    """Return probabilities (B, H, W) float32 of 1 everywhere."""
    return torch.ones(batch.truth.shape)


class MeanMasks:
    """Predicts the mean mask of a pair's phrase over the training pairs; thread-safe.

    A pixel's mean is over the pairs that do not ignore it, 0 where all do; give a reader without
    negatives. A phrase without a training pair gets the mean mask of all phrases. Takes 16 bytes of
    memory a training pair and the phrases themselves, so give a sample of a large corpus
    (``sample_tasks``).
    """

    def __init__(self, train: PairReader) -> None:
        self._train = train
        phrases = pc.fill_null(train.index["phrase"], "").combine_chunks().dictionary_encode()
        codes = phrases.indices.to_numpy()
        self._codes = {phrase: code for code, phrase in enumerate(phrases.dictionary.to_pylist())}
        self._numbers = np.argsort(codes, kind="stable")
        self._starts = np.searchsorted(codes[self._numbers], np.arange(len(self._codes) + 1))
        self._means: LruCache[str, Tensor] = LruCache(CACHE_BYTES, lambda mean: mean.nbytes)
        self._overall = self._average(np.arange(len(train)))

    def __call__(self, batch: PairBatch) -> Tensor:
        """Return probabilities (B, H, W) float32."""
        return torch.stack([self._get_mean(phrase) for phrase in batch.phrases])

    def _get_mean(self, phrase: str) -> Tensor:
        if phrase not in self._codes:
            return self._overall
        first, end = self._starts[self._codes[phrase] :][:2]
        return self._means.get_or_make(phrase, lambda: self._average(self._numbers[first:end]))

    def _average(self, numbers: np.ndarray) -> Tensor:
        if len(numbers) > PHRASE_MASKS:
            some = np.arange(PHRASE_MASKS)
            numbers = numbers[shuffle_positions(some, num=len(numbers), seed=0, epoch=0)]
        masks, ignores = self._train.read_masks(np.sort(numbers))
        if ignores is None:
            return masks.float().mean(dim=0)
        counts = 1 - ignores.float()
        return (masks.float() * counts).sum(dim=0) / counts.sum(dim=0).clamp(min=1)


def sample_tasks(
    source: Source,
    reader: PairReader,
    *,
    choice: PairChoice,
    negatives: bool = True,
    num_tasks: int = NUM_TASKS,
) -> PairReader:
    """Return a reader of the masks of a fixed random sample of the tasks that hold pairs.

    The sample is of whole tasks, because a task's index is read whole. ``choice`` and ``negatives``
    must be those of ``reader``, which is returned itself if it has no more than ``num_tasks``.
    """
    held = np.flatnonzero(np.diff(reader.task_starts))
    if len(held) <= num_tasks:
        return reader
    chosen = held[shuffle_positions(np.arange(num_tasks), num=len(held), seed=0, epoch=0)]
    tasks = reader.tasks  # each access builds a tuple of all
    names = {tasks[task] for task in chosen.tolist()}
    folder = source.latents.folder
    records = tuple(r for r in source.snapshot.records[folder] if r.task in names)
    snapshot = Snapshot(source.snapshot.digest, {folder: records})
    part = replace(source, snapshot=snapshot, features=None)
    return PairReader(part, tasks="*", inputs=frozenset(), choice=choice, negatives=negatives)


def mean_area(reader: PairReader) -> float:
    """Return the mean share of a view that a reader's masks cover, in [0, 1]; a negative's is 0."""
    areas = pc.fill_null(reader.index["mask_area"], 0).to_numpy()
    return float(areas.mean(dtype=np.float64))
