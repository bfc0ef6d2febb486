"""The scores against a plain-Python reference that loops over thresholds, pairs and pixels."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import simpson

from models.heads.metrics import SegmentationMetrics, num_thresholds

THRESHOLDS = np.linspace(0, 1, 51)[1:-1].tolist()


def slow_scores(probability, mask):
    """mIoU, IoU_FG and AP of lists of pairs, as CLIPSeg's definition reads."""
    mean_iou, pooled_iou, points = [], [], {}
    for threshold in THRESHOLDS:
        limit = float(np.float32(threshold))
        ratios, tp, fp, fn = [], 0, 0, 0
        for p_pair, m_pair in zip(probability.tolist(), mask.tolist(), strict=True):
            pair_tp = pair_fp = pair_fn = 0
            for p_row, m_row in zip(p_pair, m_pair, strict=True):
                for p, m in zip(p_row, m_row, strict=True):
                    pair_tp += p > limit and bool(m)
                    pair_fp += p > limit and not m
                    pair_fn += p <= limit and bool(m)
            ratios.append(pair_tp / (1 + pair_tp + pair_fp + pair_fn))
            tp, fp, fn = tp + pair_tp, fp + pair_fp, fn + pair_fn
        mean_iou.append(math.fsum(ratios) / len(ratios))
        pooled_iou.append(tp / (1 + tp + fp + fn))
        if tp + fp > 0:
            recall, precision = tp / (1 + tp + fn), tp / (1 + tp + fp)
            points[recall] = max(precision, points.get(recall, 0.0))
    xs = sorted(points)
    area = simpson([points[x] for x in xs], x=xs) if len(xs) > 1 else 0.0
    return max(mean_iou), max(pooled_iou), float(area)


def score(probability, mask):
    metrics = SegmentationMetrics()
    metrics.add(probability, mask)
    return metrics.compute()


def random_pairs(num_pairs=6, height=7, width=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_pairs, height, width, generator=generator) > 0.6
    noise = torch.rand(num_pairs, height, width, generator=generator)
    return (0.5 * mask + 0.5 * noise).clamp(0, 1), mask


def check_against_reference(probability, mask):
    scores = score(probability, mask)
    expected = slow_scores(probability.float(), mask)
    assert (scores.mIoU, scores.IoU_FG, scores.AP) == pytest.approx(expected, abs=1e-9)
    return scores


@pytest.mark.parametrize("seed", range(4))
def test_random_pairs_equal_the_reference(seed):
    scores = check_against_reference(*random_pairs(seed=seed))
    assert 0.3 < scores.mIoU < 1
    assert scores.num_pairs == 6


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_equal_the_reference(dtype, mask_dtype):
    probability, mask = random_pairs(num_pairs=2)
    check_against_reference(probability.to(dtype), mask.to(mask_dtype))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 5), (2, 4, 4)])
@pytest.mark.parametrize("value", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("positive", [False, True])
def test_constant_predictions_equal_the_reference(shape, value, positive):
    check_against_reference(torch.full(shape, value), torch.full(shape, positive))


def test_the_figures_of_a_pair_worked_by_hand():
    # At thresholds below 0.9: tp 2, fp 0, fn 1, so 2 / (1 + 3) with CLIPSeg's added 1.
    probability = torch.tensor([[[0.9, 0.9, 0.0, 0.0]]])
    mask = torch.tensor([[[1, 1, 1, 0]]], dtype=torch.uint8)
    scores = score(probability, mask)
    assert scores.mIoU == scores.IoU_FG == 0.5
    assert scores.AP == 0.0  # every threshold gives the same point


def test_a_probability_on_a_threshold_is_not_over_it():
    # Every threshold, and the float32 on either side of it, each in a pair of its own.
    on = np.array(THRESHOLDS, dtype=np.float32)
    below, above = np.nextafter(on, np.float32(0)), np.nextafter(on, np.float32(1))
    values = torch.tensor(np.concatenate([below, on, above]))
    metrics = SegmentationMetrics()
    metrics.add(values[None, None], torch.ones(1, 1, len(values), dtype=torch.bool))
    expected = [int((values > threshold).sum()) for threshold in THRESHOLDS]  # torch's own rule
    assert metrics.state()["true_positives"].tolist() == expected


def test_best_thresholds_are_reported():
    probability = torch.tensor([[[0.75, 0.35]]])
    mask = torch.tensor([[[True, False]]])
    scores = score(probability, mask)
    assert scores.mIoU_threshold == pytest.approx(0.36)  # the lowest that drops the wrong pixel
    assert scores.IoU_FG_threshold == pytest.approx(0.36)
    assert len(THRESHOLDS) == num_thresholds


def test_points_of_equal_recall_leave_the_most_precise():
    # Recall 1/3 twice (the second with a false pixel more), then 2/3: a trapezoid by hand.
    probability = torch.tensor([[[0.9, 0.7, 0.3]]])
    mask = torch.tensor([[[True, False, True]]])
    area = score(probability, mask).AP
    assert area == pytest.approx((2 / 3 - 1 / 3) * (1 / 2 + 2 / 4) / 2)


@pytest.mark.parametrize("cuts", [[1], [3, 4], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
def test_merging_any_split_in_any_order_gives_identical_figures(cuts):
    probability, mask = random_pairs(num_pairs=13, seed=5)
    parts = []
    for p, m in zip(probability.tensor_split(cuts), mask.tensor_split(cuts), strict=True):
        parts.append(SegmentationMetrics())
        parts[-1].add(p, m)
    merged = SegmentationMetrics()
    for part in reversed(parts):
        merged.merge(SegmentationMetrics.from_state(part.state()))
    assert merged.compute() == score(probability, mask)


def test_state_is_a_copy():
    metrics = SegmentationMetrics()
    metrics.add(*random_pairs())
    before = metrics.compute()
    for value in metrics.state().values():
        value.zero_()
    assert metrics.compute() == before


def test_no_pairs_is_an_error():
    metrics = SegmentationMetrics()
    metrics.add(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one pair, got none"):
        metrics.compute()


@pytest.mark.parametrize(
    ("probability", "mask", "message"),
    [
        (torch.zeros(1, 2, 2), torch.zeros(1, 2, 3).bool(), r"must both be \(B, H, W\)"),
        (torch.zeros(2, 2), torch.zeros(2, 2).bool(), r"must both be \(B, H, W\)"),
        (torch.zeros(1, 2, 2).int(), torch.zeros(1, 2, 2).bool(), "must be float"),
        (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), "mask bool or uint8"),
        (torch.full((1, 2, 2), 1.5), torch.zeros(1, 2, 2).bool(), "in 0..1, got 1.5"),
        (torch.full((1, 2, 2), -0.5), torch.zeros(1, 2, 2).bool(), "in 0..1, got -0.5"),
        (torch.full((1, 2, 2), math.nan), torch.zeros(1, 2, 2).bool(), "in 0..1, got nan"),
        (torch.zeros(1, 2, 2), torch.full((1, 2, 2), 255, dtype=torch.uint8), "0 or 1, got 255"),
    ],
)
def test_bad_pairs_are_refused(probability, mask, message):
    metrics = SegmentationMetrics()
    with pytest.raises(ValueError, match=message):
        metrics.add(probability, mask)


def test_a_foreign_state_is_refused():
    state = SegmentationMetrics().state()
    state["num_pairs"] = state["num_pairs"].double()
    with pytest.raises(ValueError, match="state must be"):
        SegmentationMetrics.from_state(state)


def test_ignored_pixels_count_nowhere():
    """As if they were cut out: pairs of one row, of which the ignored columns are taken away."""
    probability, mask = random_pairs(num_pairs=5, height=1, width=12)
    ignore = torch.zeros_like(mask)
    ignore[:, :, 7:] = True
    metrics = SegmentationMetrics()
    metrics.add(probability, mask, ignore.to(torch.uint8))
    cut = SegmentationMetrics()
    cut.add(probability[:, :, :7], mask[:, :, :7])
    assert metrics.compute() == cut.compute()
    metrics.add(probability, mask, torch.ones_like(mask))
    assert metrics.compute() == cut.compute()
    with pytest.raises(ValueError, match=r"must both be \(B, H, W\)"):
        metrics.add(probability, mask, ignore[:2])


def test_the_share_answered_is_of_pairs_with_a_counted_pixel_over_the_threshold():
    probability = torch.tensor([[[0.1, 0.9]], [[0.5, 0.2]], [[0.0, 0.51]], [[0.99, 0.99]]])
    none = torch.zeros_like(probability).bool()
    ignore = none.clone()
    ignore[0, 0, 1] = ignore[3] = True
    metrics = SegmentationMetrics()
    metrics.add(probability, none, ignore)
    assert [metrics.share_answered(x) for x in (0.02, 0.1, 0.5)] == pytest.approx([1, 2 / 3, 1 / 3])
    assert metrics.compute().num_pairs == 3
