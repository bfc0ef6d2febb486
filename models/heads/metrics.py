"""Segmentation scores: mIoU, IoU_FG and AP_clipseg as CLIPSeg defines them, and average precision.

Source of CLIPSeg's: FixedIntervalMetrics of https://github.com/timojl/clipseg (``metrics.py``),
re-derived. All pixels are counted into fine bins of the probability (``score_bins``), and each
pair's into the intervals between CLIPSeg's thresholds; everything else follows from sums of those
counts, so memory is constant and accumulators of several workers can be merged.

Shape suffixes: B pairs, H/W image height and width, K CLIPSeg's thresholds (49), I the intervals
between them (K + 1), N fine bins (some 7,200).
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import simpson
from torch import Tensor

from models.heads.score_bins import (
    AP_PLACES,
    INTERVALS_N,
    THRESHOLDS_K,
    find_bins,
    num_bins,
    num_thresholds,
)

_RATIO_UNIT = 2.0**-36
_CHUNK_PX = 2**18  # counted at once, in memory that is used again
_MAX_PAIRS = 2**27
_STATE_SHAPES = {
    "counts": (2, num_bins),  # pixels out of masks and in them, by bin
    "ratio_units": (num_thresholds,),
    "answered": (num_thresholds,),
    "num_pairs": (),
}


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores over ``num_pairs`` pairs, in 0..1, and the thresholds that they are reached at.

    ``mIoU`` and ``IoU_FG`` are at their best threshold (the lowest of equals). ``AP`` is the
    average precision of all pixels together. ``AP_clipseg`` is CLIPSeg's, to compare with its
    paper's and LD-ZNet's figures; it may leave 0..1 (``_integrate_precision``).
    """

    mIoU: float
    IoU_FG: float
    AP: float
    AP_clipseg: float
    mIoU_threshold: float
    IoU_FG_threshold: float
    num_pairs: int


class SegmentationMetrics:
    """Accumulates pairs of predicted probability and mask.

    Sums are int64 throughout, so they do not depend on order or split. A pair's own IoU is summed
    in units of 2^-36 for the same reason: that is within 1e-11 of the float64 mean, and holds
    134 million pairs.

    ``added_px`` is added to the denominator of each IoU: 1 as CLIPSeg does; PhraseCut's evaluator
    adds nothing, and a pair without mask and prediction has 0.
    """

    def __init__(self, added_px: int = 1) -> None:
        self._added_px = added_px
        self._state = {
            name: torch.zeros(shape, dtype=torch.int64) for name, shape in _STATE_SHAPES.items()
        }

    def add(
        self, probability_BHW: Tensor, mask_BHW: Tensor, ignore_BHW: Tensor | None = None
    ) -> None:
        """Add pairs, on any device; the work is linear in the pixels.

        A pixel is predicted where its probability is over the threshold, strictly. Probability and
        threshold are compared in float32, as torch does with CLIPSeg's float32 predictions and
        Python thresholds; half precision is widened first (CLIPSeg would narrow the threshold).

        Args:
            probability_BHW: (B, H, W) float in 0..1, after the sigmoid.
            mask_BHW: (B, H, W) bool, or uint8 of 0 and 1.
            ignore_BHW: as the mask; pixels where it is set count nowhere, and a pair none of whose
                pixels counts is left out.

        Raises:
            ValueError: shapes differ, a dtype is another one, or a value is out of range or NaN.
        """
        _check_pairs(probability_BHW, mask_BHW)
        if ignore_BHW is not None:
            _check_pairs(probability_BHW, ignore_BHW)
        if probability_BHW.numel() == 0:
            return
        step = max(1, _CHUNK_PX // probability_BHW[0].numel())
        for first in range(0, len(mask_BHW), step):
            part = slice(first, first + step)
            ignore = None if ignore_BHW is None else ignore_BHW[part]
            self._add(probability_BHW[part], mask_BHW[part], ignore)

    def _add(self, probability_BHW: Tensor, mask_BHW: Tensor, ignore_BHW: Tensor | None) -> None:
        counts_2N, each_B2I = _count(probability_BHW.float(), mask_BHW, ignore_BHW)
        fp_BK, tp_BK = _sum_over(each_B2I).unbind(dim=1)
        iou_BK = self._divide(tp_BK, each_B2I[:, 1].sum(dim=1, keepdim=True) + fp_BK)
        counts_B = each_B2I.flatten(1).any(dim=1)  # a pair without a counted pixel adds 0 elsewhere
        self._merge_state(
            {
                "counts": counts_2N,
                "ratio_units": (iou_BK / _RATIO_UNIT).round().long().sum(dim=0),
                "answered": (tp_BK + fp_BK > 0).sum(dim=0),
                "num_pairs": counts_B.sum(),
            }
        )

    def merge(self, other: "SegmentationMetrics") -> None:
        """Add what ``other`` holds, as if its pairs had been added here."""
        self._merge_state(other._state)

    def state(self) -> dict[str, Tensor]:
        """Return the sums as int64 tensors; summing states over workers is merging."""
        return {name: value.clone() for name, value in self._state.items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """Return an accumulator that holds what ``state`` returned.

        Raises:
            ValueError: a tensor is missing, unknown, not int64 or of another shape.
        """
        expected = {name: (shape, torch.int64) for name, shape in _STATE_SHAPES.items()}
        got = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
        if got != expected:
            raise ValueError(f"SegmentationMetrics: state must be {expected}, got {got}")
        metrics = cls()
        metrics._merge_state(state)
        return metrics

    def compute(self) -> Scores:
        """Return the scores of all pairs added so far.

        Raises:
            ValueError: no pair was added.
        """
        num_pairs = int(self._state["num_pairs"])
        if num_pairs == 0:
            raise ValueError(
                "SegmentationMetrics: expected at least one pair, got none; is the split empty?"
            )
        mean_iou_K, pooled_iou_K = self.list_ious()
        best_mean, best_pooled = int(mean_iou_K.argmax()), int(pooled_iou_K.argmax())
        return Scores(
            mIoU=float(mean_iou_K[best_mean]),
            IoU_FG=float(pooled_iou_K[best_pooled]),
            AP=_average_precision(self._state["counts"].numpy()),
            AP_clipseg=_integrate_precision(*self._pool()),
            mIoU_threshold=float(THRESHOLDS_K[best_mean]),
            IoU_FG_threshold=float(THRESHOLDS_K[best_pooled]),
            num_pairs=num_pairs,
        )

    def list_ious(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the pairs' mean IoU and their pooled IoU at each threshold: two (K,)."""
        state = self._state
        mean_K = state["ratio_units"].double() * _RATIO_UNIT / int(state["num_pairs"])
        tp_K, fp_K, positives = self._pool()
        return mean_K.numpy(), self._divide(tp_K, positives + fp_K).numpy()

    def _pool(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return all pairs' true and false positives, two (K,), and the pixels in masks, ()."""
        intervals_2I = torch.zeros(2, num_thresholds + 1, dtype=torch.int64)
        intervals_2I.index_add_(1, INTERVALS_N, self._state["counts"])
        fp_K, tp_K = _sum_over(intervals_2I)
        return tp_K, fp_K, intervals_2I[1].sum()

    def _divide(self, tp: Tensor, union: Tensor) -> Tensor:
        return tp.double() / (self._added_px + union).clamp(min=1).double()

    def share_answered(self, threshold: float) -> float:
        """Return the share of pairs with a counted pixel over a threshold, of those in ``Scores``.

        Of negatives it is the share with a false answer.
        """
        number = int(np.abs(THRESHOLDS_K - threshold).argmin())
        return float(self._state["answered"][number]) / int(self._state["num_pairs"])

    def _merge_state(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self._state[name] += value.cpu()
        assert int(self._state["num_pairs"]) <= _MAX_PAIRS, "ratio_units would overflow"


def _check_pairs(probability_BHW: Tensor, mask_BHW: Tensor) -> None:
    if probability_BHW.ndim != 3 or probability_BHW.shape != mask_BHW.shape:
        raise ValueError(
            "SegmentationMetrics: probability and mask must both be (B, H, W), got "
            f"{tuple(probability_BHW.shape)} and {tuple(mask_BHW.shape)}"
        )
    if not probability_BHW.is_floating_point() or mask_BHW.dtype not in (torch.bool, torch.uint8):
        raise ValueError(
            "SegmentationMetrics: probability must be float and mask bool or uint8, got "
            f"{probability_BHW.dtype} and {mask_BHW.dtype}"
        )
    if probability_BHW.numel() == 0:
        return
    low, high = (float(bound) for bound in probability_BHW.aminmax())
    if not (low >= 0.0 and high <= 1.0):  # so that NaN fails too
        raise ValueError(
            f"SegmentationMetrics: probability must be in 0..1, got {low} to {high}; "
            "apply the sigmoid to logits first"
        )
    if mask_BHW.dtype == torch.uint8 and int(mask_BHW.max()) > 1:
        raise ValueError(f"SegmentationMetrics: mask must be 0 or 1, got {int(mask_BHW.max())}")


def _count(
    probability_BHW: Tensor, mask_BHW: Tensor, ignore_BHW: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Count pixels out of masks and in them: (2, N) of all pairs and (B, 2, I) of each, int64."""
    kind_BHW, num_kinds = mask_BHW.int(), 2
    if ignore_BHW is not None:
        kind_BHW, num_kinds = kind_BHW.masked_fill(ignore_BHW.bool(), 2), 3
    bin_BHW = find_bins(probability_BHW)
    interval_BHW = INTERVALS_N.to(bin_BHW.device).index_select(0, bin_BHW.flatten())
    interval_BHW = interval_BHW.view(bin_BHW.shape)
    row_B = torch.arange(len(mask_BHW), dtype=torch.int32, device=mask_BHW.device)
    bin_BHW += kind_BHW * num_bins
    interval_BHW += (num_kinds * row_B[:, None, None] + kind_BHW) * (num_thresholds + 1)
    length = num_kinds * len(mask_BHW) * (num_thresholds + 1)
    counts = torch.bincount(bin_BHW.flatten(), minlength=num_kinds * num_bins)
    each = torch.bincount(interval_BHW.flatten(), minlength=length)
    each_BnI = each.view(-1, num_kinds, num_thresholds + 1)
    return counts.view(num_kinds, num_bins)[:2], each_BnI[:, :2]


def _sum_over(counts: Tensor) -> Tensor:
    """Return the pixels over each threshold, (…, K) of counts (…, I): over i of them is i."""
    return counts.sum(dim=-1, keepdim=True) - counts.cumsum(dim=-1)[..., :-1]


def _average_precision(counts_2N: NDArray[np.int64]) -> float:
    """Return the sum over thresholds of the recall gained there times the precision there.

    The thresholds are ``score_bins.AP_EDGES``, and 0; as in scikit-learn and torchmetrics a pixel
    is predicted where its probability is at or over one, and there are no lines between points, so
    that the pixels of a bin tie and a constant prediction has the share of the masks. All logits
    over 16.6 tie, because their probability is 1 in float32, and all below -16. Without a pixel in
    a mask it is 0.
    """
    starts = [0, *(AP_PLACES + 1)]
    wrong, gained = np.add.reduceat(counts_2N, starts, axis=1)[:, ::-1]
    tp, fp = gained.cumsum(), wrong.cumsum()
    return float((gained * (tp / np.maximum(tp + fp, 1))).sum() / max(int(tp[-1]), 1))


def _integrate_precision(tp: Tensor, fp: Tensor, positives: Tensor) -> float:
    """Integrate precision over recall by Simpson's rule, at the thresholds that predict a pixel.

    Of points with the same recall only the most precise, the highest threshold's, counts: where
    recall stands still there is no area, and Simpson's weights for an interval of no width are not
    defined (scipy's are finite, but do not sum to the width). CLIPSeg removes only points that are
    equal in both and so depends on them; without such ties the two are the same, but for the last
    interval of an even number of points: scipy before 1.11 took a trapezoid's average there. One
    point has no area: 0. As in CLIPSeg, parabolas through uneven points may leave 0..1, and by
    far where a head is hardly trained, or sure of every pixel.
    """
    tp_K, fp_K = tp.numpy(), fp.numpy()
    predicted = tp_K + fp_K > 0
    precision = tp_K / (1 + tp_K + fp_K)
    recall = tp_K / (1 + int(positives))
    # Thresholds ascend, so of equal recalls a dict keeps the highest threshold's point.
    best = dict(zip(recall[predicted].tolist(), precision[predicted].tolist(), strict=True))
    if len(best) < 2:
        return 0.0
    points = sorted(best.items())
    return float(simpson([y for _, y in points], x=[x for x, _ in points]))
