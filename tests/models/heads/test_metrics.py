"""The scores against a plain-Python reference that loops over thresholds, pairs and pixels."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import simpson

from models.heads.metrics import SegmentationMetrics
from models.heads.score_bins import AP_EDGES, num_thresholds

THRESHOLDS = np.linspace(0, 1, 51)[1:-1].tolist()


def slow_scores(probability, mask):
    """mIoU, IoU_FG and AP_clipseg of lists of pairs, as CLIPSeg's definition reads."""
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


def slow_precision(probability, mask, thresholds):
    """Average precision, by its definition, over thresholds that a pixel is at or over."""
    every, hit = (np.sort(x.float().numpy()) for x in (probability.flatten(), probability[mask]))
    area = recall_before = 0.0
    for threshold in sorted(set(thresholds), reverse=True):
        found, hits = (len(x) - np.searchsorted(x, np.float32(threshold)) for x in (every, hit))
        area += (hits / len(hit) - recall_before) * (hits / max(found, 1))
        recall_before = hits / len(hit)
    return area


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
    found = (scores.mIoU, scores.IoU_FG, scores.AP_clipseg)
    assert found == pytest.approx(expected, abs=1e-9)
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
    assert scores.AP_clipseg == 0.0  # every threshold gives the same point
    # 2/3 of the mask at precision 1, the last third with everything: 3 of 4.
    assert pytest.approx(2 / 3 + 1 / 3 * 3 / 4) == scores.AP


def test_a_probability_on_a_threshold_is_not_over_it():
    # Every threshold, and the float32 on either side of it, each in a pair of its own.
    on = np.array(THRESHOLDS, dtype=np.float32)
    below, above = np.nextafter(on, np.float32(0)), np.nextafter(on, np.float32(1))
    values = torch.tensor(np.concatenate([below, on, above]))
    metrics = SegmentationMetrics(added_px=0)
    metrics.add(values[None, None], torch.ones(1, 1, len(values), dtype=torch.bool))
    expected = [int((values > threshold).sum()) for threshold in THRESHOLDS]  # torch's own rule
    assert (metrics.list_ious()[1] * len(values)).tolist() == pytest.approx(expected)


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
    area = score(probability, mask).AP_clipseg
    assert area == pytest.approx((2 / 3 - 1 / 3) * (1 / 2 + 2 / 4) / 2)


def list_predictions():
    """Probabilities and masks (4, 32, 32) of kinds on which scores have gone wrong."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(4, 32, 32, generator=generator) < 0.13
    noise = torch.randn(4, 32, 32, generator=generator)
    one = torch.zeros_like(mask)
    one[2, 5, 7] = True
    nearly = 0.12 + 0.01 * noise
    return {
        "trained": (torch.sigmoid(4 * noise - 3 + 5 * mask), mask),
        "nearly constant": (nearly, mask),
        "constant": (torch.full_like(noise, 0.3), mask),
        "everything": (torch.ones_like(noise), mask),
        "nothing": (torch.zeros_like(noise), mask),
        "reversed": (torch.sigmoid(noise - 6 * mask), mask),
        "sharp": (torch.sigmoid(torch.where(noise > 1.5, ~mask, mask) * 80 - 40.0), mask),
        "sharp, ranked": (torch.sigmoid(14.0 * mask - 4 + 3 * noise), mask),
        "true mask": (mask.float(), mask),
        "tiny": (torch.sigmoid(noise - 12 + mask), mask),
        "one pixel": (torch.sigmoid(noise + 2 * one), one),
    }


@pytest.mark.parametrize("kind", list_predictions())
def test_average_precision_is_its_definition(kind):
    """Equal at the same thresholds, and near to that over every score."""
    probability, mask = list_predictions()[kind]
    found = score(probability, mask).AP
    at_edges = slow_precision(probability, mask, [0.0, *AP_EDGES.tolist()])
    assert found == pytest.approx(at_edges, abs=1e-12)
    assert 0 <= found <= 1
    if kind in ("constant", "everything", "nothing"):
        assert found == pytest.approx(mask.double().mean().item())
    every = slow_precision(probability, mask, probability.flatten().tolist())
    assert found == pytest.approx(every, abs=0.002)
    if kind == "true mask":
        assert found == 1


def test_average_precision_stays_where_simpsons_rule_leaves_0_to_1():
    """On a nearly constant prediction; its average precision is the share of the mask, about."""
    found = []
    for seed in range(26, 32):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(4, 32, 32, generator=generator) < 0.13
        noise = 0.01 * torch.randn(4, 32, 32, generator=generator)
        found.append(score(0.12 + noise, mask))
    assert min(scores.AP_clipseg for scores in found) < 0
    assert all(0.1 < scores.AP < 0.16 for scores in found)


def test_without_a_pixel_in_a_mask_average_precision_is_0():
    scores = score(torch.rand(2, 3, 3), torch.zeros(2, 3, 3).bool())
    assert (scores.AP, scores.AP_clipseg) == (0, 0)


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
