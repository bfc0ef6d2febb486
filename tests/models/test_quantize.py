"""int8 storage: the error bound that the docstring states."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from models.quantize import dequantize_int8, quantize_int8


@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-6, 1e4))
def test_error_is_at_most_half_a_scale(seed, scale):
    feature = torch.randn(3, 5, 4, 2, generator=torch.Generator().manual_seed(seed)) * scale
    quantized, step = quantize_int8(feature)
    assert quantized.dtype == torch.int8
    assert step.shape == (3, 5)
    assert quantized.min() >= -127
    error = (dequantize_int8(quantized, step) - feature).abs().amax(dim=(-2, -1))
    assert (error <= step * 0.5001).all()


def test_zeros_come_back_as_zeros():
    quantized, scale = quantize_int8(torch.zeros(1, 2, 3, 3))
    assert torch.equal(dequantize_int8(quantized, scale), torch.zeros(1, 2, 3, 3))
    assert torch.equal(scale, torch.zeros(1, 2))
