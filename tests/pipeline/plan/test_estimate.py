"""Totals from samples, and whether their ranges hold the truth as often as they say."""

import numpy as np
import pytest

from pipeline.plan.estimate import (
    MAX_RELATIVE,
    Estimate,
    count_distinct,
    estimate_total,
    growth_exponent,
    ratio_error,
    share_range,
)


def test_a_range_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    sizes = rng.uniform(1, 9, 1000)
    truth = sizes * rng.normal(5, 1, 1000)
    held = 0
    for _ in range(300):
        chosen = rng.choice(1000, 12, replace=False)
        found = estimate_total(
            truth[chosen], sizes[chosen], weights=[1000 / 12] * 12, whole=float(sizes.sum())
        )
        held += found.low <= truth.sum() <= found.high
    assert 270 <= held <= 298  # 285 expected


def test_all_tars_looked_into_leave_no_doubt():
    found = estimate_total([3, 5, 9], [1, 2, 3], weights=[1, 1, 1], whole=6)
    assert found == Estimate(17, 17, 17)


def test_one_tar_of_many_tells_nothing_of_the_others():
    assert ratio_error([4], [2], weights=[9]) == MAX_RELATIVE
    assert estimate_total([4], [2], weights=[9], whole=20) == Estimate(40, 0, 80)


def test_fewer_tars_widen_the_range():
    few = ratio_error([4, 6], [1, 1], weights=[50] * 2)
    many = ratio_error([4, 6] * 5, [1] * 10, weights=[10] * 10)
    assert few > 3 * many > 0


def test_a_tar_that_holds_as_much_for_its_bytes_is_no_scatter():
    assert ratio_error([10, 20, 70], [1, 2, 7], weights=[50 / 3] * 3) == pytest.approx(0, abs=1e-12)


def test_no_reject_seen_is_not_no_reject():
    low, high = share_range(64, 64)
    assert 0.9 < low < 0.96
    assert high == 1
    assert share_range(0, 0) == (0, 1)


def test_distinct_prompts_are_all_phrases_where_each_has_one_form():
    assert count_distinct([1, 7, 2], num_forms=1, kept=1) == 3


def test_distinct_prompts_of_several_forms_match_a_simulation():
    rng = np.random.default_rng(1)
    counts = [1, 4, 30]
    drawn = [
        sum(len(set(rng.integers(9, size=n)[rng.random(n) < 0.8])) for n in counts)
        for _ in range(2000)
    ]
    assert count_distinct(counts, num_forms=9, kept=0.8) == pytest.approx(np.mean(drawn), rel=0.02)


def test_prompts_of_a_closed_vocabulary_stop_growing_and_new_ones_do_not():
    assert growth_exponent([500] * 11, num_forms=1, kept=1) == pytest.approx(0, abs=1e-6)
    assert growth_exponent([1] * 500, num_forms=1, kept=1) == pytest.approx(1)
    assert growth_exponent([], num_forms=1, kept=1) == 0


def test_estimates_add_and_scale_with_their_ranges():
    both = Estimate(10, 8, 12) + Estimate(1, 1, 1)
    assert both == Estimate(11, 9, 13)
    assert both.scaled(2).high == pytest.approx(26)
    assert both.scaled(1, relative=0.5).relative > 0.5
    assert both.stretched(3) == Estimate(11, 9 / 4, 52)


def test_the_more_of_all_tars_are_looked_into_the_less_is_left_open():
    found, sizes = [4, 6] * 5, [1] * 10
    half = ratio_error(found, sizes, weights=[2] * 10)
    assert half == pytest.approx(0.5**0.5 * ratio_error(found, sizes, weights=[1e8] * 10))


def test_tars_of_one_count_are_counted_however_their_bytes_differ():
    """The small ones among 20 tars stand for two each: without their weight 316 in 313 to 319."""
    rng = np.random.default_rng(0)
    sizes = np.sort(rng.uniform(90, 110, 20))
    chosen, weights = [0, 2, 4, 6, *range(8, 20)], [2] * 4 + [1] * 12
    found = estimate_total([16] * 16, sizes[chosen], weights=weights, whole=float(sizes.sum()))
    assert found.value == pytest.approx(320, rel=0.005)
    assert found.low <= 320 <= found.high


def test_strata_of_different_sizes_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(2)
    sizes = np.sort(rng.uniform(1, 9, 100))
    truth = 16 + rng.normal(0, 2, 100) + sizes
    strata = np.array_split(np.arange(100), 16)
    held = 0
    for _ in range(300):
        chosen = [int(rng.choice(stratum)) for stratum in strata]
        found = estimate_total(
            truth[chosen], sizes[chosen], weights=[len(s) for s in strata], whole=float(sizes.sum())
        )
        held += found.low <= truth.sum() <= found.high
    assert held >= 280


def test_what_was_tried_is_no_doubt():
    assert share_range(15, 16, num_units=16) == (15 / 16, 15 / 16)
    some, none = share_range(16, 16, num_units=32), share_range(16, 16)
    assert none[0] < some[0] < some[1] == 1
