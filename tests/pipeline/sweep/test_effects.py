"""Differences between heads of equal seed, and what is said of them."""

import pytest

from pipeline.sweep.effects import Contrast, measure_effects

CONTRAST = Contrast("Is it better?", "ours", "theirs", "validation")


def rows(variant, values, *, scored_on="validation", status="done"):
    return [
        {"variant": variant, "seed": seed, "scored_on": scored_on, "status": status}
        | {"mIoU": value, "AP": value + 0.1}
        for seed, value in values.items()
    ]


def test_differences_are_of_equal_seeds():
    found = [*rows("ours", {0: 0.5, 1: 0.7, 2: 0.9}), *rows("theirs", {2: 0.6, 0: 0.4, 7: 0.0})]
    (effect,) = measure_effects(found, [CONTRAST])
    spread = effect.spreads["mIoU"]
    assert spread.mean == pytest.approx(0.2)  # of 0.1 and 0.3
    assert spread.deviation == pytest.approx(0.02**0.5)
    assert spread.num == 2


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ((0.519, 0.52, 0.521), "yes"),
        ((0.481, 0.48, 0.479), "the other way round"),
        ((0.51, 0.52, 0.53), "not beyond the spread"),  # 3.5 standard errors, of 4.3 that it takes
        ((0.40, 0.52, 0.61), "not beyond the spread"),
        ((0.50, 0.50, 0.50), "no difference"),
        ((0.50002, 0.50002, 0.50002), "no difference"),
        ((0.55, 0.45, 0.501), "not beyond the spread"),  # their mean is 0.5003
    ],
)
def test_an_answer_needs_its_interval_clear_of_zero(ours, verdict):
    found = [*rows("ours", dict(enumerate(ours))), *rows("theirs", {0: 0.5, 1: 0.5, 2: 0.5})]
    (effect,) = measure_effects(found, [CONTRAST])
    assert effect.verdict == verdict


def test_one_metric_alone_is_named():
    found = [*rows("ours", {0: 0.6, 1: 0.601}), *rows("theirs", {0: 0.5, 1: 0.5})]
    found[0]["AP"] -= 0.3
    (effect,) = measure_effects(found, [CONTRAST])
    assert effect.verdict == "in mIoU alone"


def test_metrics_that_disagree_are_said_to():
    found = [*rows("ours", {0: 0.6, 1: 0.601}), *rows("theirs", {0: 0.5, 1: 0.5})]
    for row in found[:2]:
        row["AP"] -= 0.5
    (effect,) = measure_effects(found, [CONTRAST])
    assert effect.verdict == "mixed"


def test_one_seed_says_nothing_for_sure():
    found = [*rows("ours", {0: 0.9}), *rows("theirs", {0: 0.1})]
    (effect,) = measure_effects(found, [CONTRAST])
    assert effect.spreads["AP"].deviation is None
    assert effect.verdict == "not beyond the spread"


@pytest.mark.parametrize(
    "theirs",
    [
        rows("theirs", {0: 0.1}, scored_on="another"),
        rows("theirs", {1: 0.1}),
        rows("theirs", {0: 0.1}, status="failed"),
        rows("theirs", {None: 0.1}),
    ],
)
def test_what_has_nothing_to_be_held_against_is_left_out(theirs):
    assert measure_effects([*rows("ours", {0: 0.9, None: 0.9}), *theirs], [CONTRAST]) == []
