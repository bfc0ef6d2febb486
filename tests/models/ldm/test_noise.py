"""Noise that depends on what it is for: pinned values, right distribution, no dependence."""

import numpy as np
import pytest
import torch

from models.ldm.draws import draw_integer
from models.ldm.noise import draw_noise

NAME = {"seed": 0, "key": "train/000001", "view": 0, "draw": 0}

GOLDEN_NOISE = [
    [-1.1042487621307373, 1.0347559452056885],
    [-0.09294643998146057, 1.105780005455017],
]
GOLDEN_TIMESTEPS = [482, 473, 481, 406, 376, 394]


def test_noise_is_pinned():
    # Changing these breaks every store: a features layer could no longer be recomputed.
    noise = draw_noise((2, 2), **NAME)
    expected = torch.tensor(GOLDEN_NOISE)
    torch.testing.assert_close(noise, expected, rtol=0, atol=0)


def test_integers_are_pinned():
    values = [draw_integer(300, 500, purpose="timestep", **{**NAME, "draw": d}) for d in range(6)]
    assert values == GOLDEN_TIMESTEPS


def test_noise_is_standard_normal():
    noise = draw_noise((1_000_000,), **NAME).double()
    assert abs(noise.mean()) < 5e-3
    assert abs(noise.var() - 1) < 1e-2
    assert abs((noise**4).mean() - 3) < 5e-2
    assert torch.isfinite(noise).all()


@pytest.mark.parametrize("other", [{"seed": 1}, {"key": "train/000002"}, {"view": 1}, {"draw": 1}])
def test_each_part_of_the_name_gives_other_noise(other):
    first, second = draw_noise((4096,), **NAME), draw_noise((4096,), **{**NAME, **other})
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_a_shorter_draw_of_odd_length_works():
    assert draw_noise((3,), **NAME).shape == (3,)


def test_integers_fill_their_range_evenly():
    draws = [draw_integer(3, 7, purpose="x", **{**NAME, "draw": d}) for d in range(4000)]
    counts = np.bincount(draws, minlength=8)
    assert counts[:3].sum() == counts[7:].sum() == 0
    assert counts[3:7].min() > 900
