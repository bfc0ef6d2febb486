"""The schedules, of which plateau is held to PyTorch's."""

import json

import numpy as np
import pytest
import torch

from pipeline.train.step import LearningRate
from tests.support.train_runs import make


def test_warm_up_then_cosine_to_nothing():
    rate = LearningRate(make(num_steps=10, warmup_steps=4, schedule="cosine", learning_rate=2.0))
    rates = [rate.at(step) for step in range(10)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[7] == pytest.approx(1.0)
    assert sorted(rates[4:], reverse=True) == rates[4:]


def test_constant_ignores_scores():
    rate = LearningRate(make(num_steps=10))
    for _ in range(9):
        rate.update_plateau(0.0)
    assert {rate.at(step) for step in range(10)} == {make().learning_rate}


@pytest.mark.parametrize("seed", range(5))
def test_plateau_is_pytorchs_also_when_resumed_at_any_validation(seed):
    scores = np.random.default_rng(seed).uniform(0.3, 0.4, size=25).tolist()
    config = make(schedule="plateau", learning_rate=1e-3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.5, patience=1, eps=0.0
    )
    ours = LearningRate(config)
    for step, score in enumerate(scores):
        ours.update_plateau(score)
        theirs.step(score)
        assert ours.at(step) == optimizer.param_groups[0]["lr"]
        state = json.loads(json.dumps(ours.state))
        ours = LearningRate(config)
        ours.state |= state
    assert ours.at(0) < 1e-3


def test_plateau_warms_up_too():
    rate = LearningRate(make(num_steps=10, warmup_steps=2, schedule="plateau", learning_rate=2.0))
    assert [rate.at(step) for step in range(4)] == [1.0, 2.0, 2.0, 2.0]


def resume(config, step, *, state=None, **changes):
    """The rate of a run that goes on from a step with other values."""
    rate = LearningRate(make(config, **changes))
    rate.resume(LearningRate(config).state if state is None else state, earlier=config, step=step)
    return rate


@pytest.mark.parametrize("schedule", ["constant", "cosine", "plateau"])
@pytest.mark.parametrize("step", [1, 5])
def test_an_unchanged_warm_up_goes_on_also_from_a_state_that_does_not_tell_of_it(schedule, step):
    config = make(num_steps=10, warmup_steps=3, schedule=schedule)
    whole = LearningRate(config)
    for state in (None, {}, {"factor": 1.0, "best": None, "num_worse": 0}):  # as older versions
        again = resume(config, step, state=state)
        assert [again.at(s) for s in range(10)] == [whole.at(s) for s in range(10)]
        assert again.state == whole.state


def test_another_warm_up_counts_from_where_the_run_goes_on():
    config = make(num_steps=100, warmup_steps=10, learning_rate=2.0)
    rate = resume(config, 50, learning_rate=1.0, warmup_steps=4)
    assert [rate.at(step) for step in range(50, 56)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    later = resume(make(config, learning_rate=1.0, warmup_steps=4), 52, state=rate.state)
    assert [later.at(step) for step in range(52, 55)] == [0.75, 1.0, 1.0]
    assert resume(config, 5, warmup_steps=0).at(5) == 2.0
    assert resume(config, 50, learning_rate=1.0).at(50) == 1.0  # it was over


def test_a_warm_up_in_a_cosine_climbs_to_the_curve():
    config = make(num_steps=100, warmup_steps=10, schedule="cosine")
    curve, rate = LearningRate(config), resume(config, 50, state={}, warmup_steps=20)
    assert [rate.at(step) for step in range(70, 100)] == [curve.at(s) for s in range(70, 100)]
    assert rate.at(59) == pytest.approx(curve.at(59) / 2)


def test_the_curve_is_that_of_the_new_values_at_the_steps_number():
    config = make(num_steps=100, schedule="cosine")
    longer = LearningRate(make(num_steps=200, schedule="cosine"))
    assert resume(config, 100, num_steps=200).at(150) == longer.at(150)
    assert resume(make(num_steps=100), 60, schedule="cosine").at(60) == LearningRate(config).at(60)


def test_plateau_keeps_its_halvings_under_another_rate_and_constant_has_none():
    config = make(schedule="plateau", learning_rate=2.0)
    state = {"factor": 0.25, "best": 0.5, "num_worse": 1}
    assert resume(config, 5, state=state, learning_rate=1.0).at(5) == 0.25
    assert resume(config, 5, state=state, schedule="constant").at(5) == 2.0
