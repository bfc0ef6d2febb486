"""Scoring a head on a store's pairs, beside what no head at all would score."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.head import Head
from models.metrics import Scores, SegmentationMetrics
from models.noise import draw_integer
from pipeline.reader import Batch, PairReader, move_inputs

logger = logging.getLogger(__name__)

PHRASE_MASKS = 200  # training masks averaged a phrase, at most; chosen by hash
BASELINE_FOREGROUND = "everything foreground"
BASELINE_MEAN_MASK = "phrase's mean training mask"


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


def evaluation_draw(num_draws: int) -> int:
    """Return the draw that evaluation reads: the middle one, t = 400 of 300, 400, 500."""
    return num_draws // 2


def iterate_batches(reader: PairReader, numbers: np.ndarray, *, batch: int) -> Iterator[Batch]:
    """Yield batches of pairs in order, the next one read while this one is used."""
    draw = evaluation_draw(reader.num_draws)

    def read(start: int) -> Batch:
        chosen = numbers[start : start + batch]
        return reader.read(chosen, draws=[draw] * len(chosen))

    starts = range(0, len(numbers), batch)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as pool:
        pending = [pool.submit(read, start) for start in starts[:1]]
        for start in [*starts[1:], None]:
            ready = pending.pop().result()
            if start is not None:
                pending.append(pool.submit(read, start))
            yield ready


@torch.inference_mode()
def predict(head: Head, batch: Batch, *, device: torch.device) -> Tensor:
    """Return foreground probabilities (B, H, W) float32 on the CPU."""
    logits = head(**move_inputs(batch.inputs, device))
    return torch.sigmoid(logits.float())[:, 0].cpu()


def score_head(
    head: Head,
    reader: PairReader,
    numbers: np.ndarray,
    *,
    device: torch.device,
    batch: int,
    on_batch: Callable[[int], None] | None = None,
) -> Scores:
    """Score a head over some pairs; ``on_batch`` hears how many are done."""
    metrics = SegmentationMetrics()
    done = 0
    for pairs in iterate_batches(reader, numbers, batch=batch):
        metrics.add(predict(head, pairs, device=device), pairs.mask)
        done += len(pairs.keys)
        if on_batch is not None:
            on_batch(done)
    return metrics.compute()


def score_baselines(
    train: PairReader, validation: PairReader, numbers: np.ndarray, *, batch: int
) -> list[ScoredRow]:
    """Score what needs no head: everything foreground, and each phrase's mean training mask.

    A phrase never seen in training takes the mean of all training masks sampled.
    """
    foreground, mean_mask = SegmentationMetrics(), SegmentationMetrics()
    phrases = validation.index["phrase"].to_numpy(zero_copy_only=False)[numbers]
    means = _mean_masks(train, sorted(set(phrases)))
    order = np.argsort(phrases, kind="stable")
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        masks = validation.read_masks(numbers[chosen])
        foreground.add(torch.ones(masks.shape), masks)
        mean_mask.add(torch.stack([means(phrases[i]) for i in chosen]), masks)
    return [
        ScoredRow(BASELINE_FOREGROUND, foreground.compute(), baseline=True),
        ScoredRow(BASELINE_MEAN_MASK, mean_mask.compute(), baseline=True),
    ]


def _mean_masks(train: PairReader, phrases: list[str]) -> Callable[[str], Tensor]:
    """Return phrase → mean mask (H, W) float32; the last phrase asked for is kept."""
    numbers: dict[str, list[int]] = {phrase: [] for phrase in phrases}
    for number, phrase in enumerate(train.index["phrase"].to_pylist()):
        if phrase in numbers:
            numbers[phrase].append(number)
    overall = _mean_of(train, list(range(len(train))), "")
    last: dict[str, Tensor] = {}

    def mean(phrase: str) -> Tensor:
        if phrase not in last:
            last.clear()
            last[phrase] = _mean_of(train, numbers[phrase], phrase) if numbers[phrase] else overall
        return last[phrase]

    return mean


def _mean_of(train: PairReader, numbers: list[int], phrase: str) -> Tensor:
    if len(numbers) > PHRASE_MASKS:
        chosen = {
            draw_integer(
                0, len(numbers), purpose="mean-mask", seed=0, key=phrase, view=0, draw=draw
            )
            for draw in range(PHRASE_MASKS)
        }
        numbers = [numbers[i] for i in sorted(chosen)]
    return train.read_masks(numbers).float().mean(dim=0)
