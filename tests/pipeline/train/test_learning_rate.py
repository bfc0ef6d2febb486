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
