"""The latents' scale as a checkpoint states it."""

import pytest
import torch

from models.convert.configs import read_scaling_factor
from models.convert.names import ConversionError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_rounded_scale_is_stable_diffusions(dtype):
    rounded = torch.tensor(0.18215, dtype=dtype)
    assert read_scaling_factor(rounded) == read_scaling_factor(rounded.float()) == 0.18215


def test_another_scale_stays():
    assert read_scaling_factor(torch.tensor(0.1822)) == 0.1822


@pytest.mark.parametrize("scale", [0.0, -0.2, float("nan"), float("inf"), [0.2, 0.2]])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ConversionError, match="scale_factor: expected one finite number above 0"):
        read_scaling_factor(torch.tensor(scale))
