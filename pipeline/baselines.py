"""What no head at all would score: everything foreground, and each phrase's mean training mask."""

import numpy as np
import torch
from torch import Tensor

from pipeline.order import shuffle_positions
from pipeline.reader import Batch, PairReader
from pipeline.recent import Recent

PHRASE_MASKS = 200  # training masks averaged a phrase, at most: a fixed choice
KEPT_BYTES = 256 * 2**20  # of mean masks: some 450 of 384 px
BASELINE_FOREGROUND = "everything foreground"
BASELINE_MEAN_MASK = "phrase's mean training mask"


def predict_foreground(batch: Batch) -> Tensor:
    """Return probabilities (B, H, W) float32 that say foreground everywhere."""
    return torch.ones(batch.mask.shape)


class MeanMasks:
    """Predicts the mean mask of a pair's phrase over training pairs. Threads may share it.

    A phrase that they lack takes the mean of the masks of any phrase. Keeps 16 bytes a training
    pair and the phrases themselves, so give a sample of a large corpus (``sample_tasks``).
    """

    def __init__(self, train: PairReader) -> None:
        self._train = train
        phrases = train.index["phrase"].combine_chunks().dictionary_encode()
        codes = phrases.indices.to_numpy()
        self._codes = {phrase: code for code, phrase in enumerate(phrases.dictionary.to_pylist())}
        self._numbers = np.argsort(codes, kind="stable")
        self._starts = np.searchsorted(codes[self._numbers], np.arange(len(self._codes) + 1))
        self._means: Recent[str, Tensor] = Recent(KEPT_BYTES, lambda mean: mean.nbytes)
        self._overall = self._average(np.arange(len(train)))

    def __call__(self, batch: Batch) -> Tensor:
        """Return probabilities (B, H, W) float32."""
        return torch.stack([self._find(phrase) for phrase in batch.phrases])

    def _find(self, phrase: str) -> Tensor:
        if phrase not in self._codes:
            return self._overall
        first, end = self._starts[self._codes[phrase] :][:2]
        return self._means.find(phrase, lambda: self._average(self._numbers[first:end]))

    def _average(self, numbers: np.ndarray) -> Tensor:
        if len(numbers) > PHRASE_MASKS:
            some = np.arange(PHRASE_MASKS)
            numbers = numbers[shuffle_positions(some, num=len(numbers), seed=0, epoch=0)]
        return self._train.read_masks(np.sort(numbers)).float().mean(dim=0)
