"""int8 and 4-bit forms: the error bounds that the docstrings state."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from models.ldm.quantize import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8

FLOAT32_MAX = torch.finfo(torch.float32).max
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def draw_feature(seed, *, exponent, dtype=torch.float32, side=(4, 3), outlier=None, zeros=False):
    """(3, 5, h, w) about 2^exponent, finite in ``dtype``; one huge value, one channel of zeros."""
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randn(3, 5, *side, generator=generator, dtype=torch.float64)
    feature *= 2.0**exponent
    if outlier is not None:
        feature[:, 1, -1, 0] = outlier
    if zeros:
        feature[1, 2] = 0.0
    largest = torch.finfo(dtype).max
    return feature.clamp(-largest, largest).to(dtype)


def spread(scale, feature, group):
    """4-bit scales (N, C, G) as one a position (N, C, h, w), float64."""
    num = feature[0, 0].numel()
    spread = scale.double().repeat_interleave(group, dim=-1)[..., :num]
    return spread.reshape(feature.shape)


@given(
    seed=SEEDS,
    exponent=st.integers(-150, 125),
    dtype=DTYPES,
    outlier=st.none() | st.sampled_from([FLOAT32_MAX, -FLOAT32_MAX, 6e4, 1e-45]),
    zeros=st.booleans(),
)
@example(seed=0, exponent=-146, dtype=torch.float32, outlier=None, zeros=True)
@example(seed=0, exponent=-142, dtype=torch.bfloat16, outlier=None, zeros=False)
@example(seed=0, exponent=127, dtype=torch.float32, outlier=FLOAT32_MAX, zeros=False)
def test_int8_error_is_at_most_half_a_scale(seed, exponent, dtype, outlier, zeros):
    feature = draw_feature(seed, exponent=exponent, dtype=dtype, outlier=outlier, zeros=zeros)
    quantized, scale = quantize_int8(feature)
    assert (quantized.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (3, 5))
    assert quantized.min() >= -127
    found = dequantize_int8(quantized, scale)
    error = (found.double() - feature.double()).abs()
    assert (error <= scale.double()[..., None, None] * (0.5 + 2**-15)).all()
    largest = feature.double().abs().amax(dim=(-2, -1))
    assert (scale.double() <= (largest / 127 * (1 + 2**-23)).clamp(min=2.0**-126)).all()
    assert torch.equal(scale == 0, largest == 0)


def test_int8_keeps_a_channel_smaller_than_float32s_normal_numbers_divided_by_127():
    """As a scale, max|x| / 127, here 1.5 of the smallest subnormal, would clip 190 to 127."""
    feature = torch.tensor([[[[63.0, -190.0, 1.0, 0.0]]]], dtype=torch.float64) * 2.0**-149
    quantized, scale = quantize_int8(feature.float())
    assert scale.item() == 2.0**-126
    assert (dequantize_int8(quantized, scale).double() - feature).abs().max() <= 2.0**-127


def test_zeros_come_back_as_zeros():
    zeros = torch.zeros(1, 2, 3, 3)
    quantized, scale = quantize_int8(zeros)
    assert torch.equal(dequantize_int8(quantized, scale), zeros)
    assert torch.equal(scale, torch.zeros(1, 2))
    packed, scale = quantize_int4(zeros, group=4)
    assert torch.equal(dequantize_int4(packed, scale, shape=(1, 2, 3, 3), group=4), zeros)
    assert torch.equal(scale, torch.zeros(1, 2, 3, dtype=torch.float16))


@given(
    seed=SEEDS,
    exponent=st.integers(-40, 12),
    dtype=DTYPES,
    outlier=st.none() | st.sampled_from([4e5, -6e4, 1e-7]),
    zeros=st.booleans(),
    group=st.integers(1, 14),
    side=st.sampled_from([(4, 3), (3, 3), (1, 1)]),
)
# Scales of 1 to 2 of float16's smallest steps; and below that step.
@example(seed=0, exponent=-23, dtype=torch.float32, outlier=None, zeros=True, group=5, side=(3, 3))
@example(seed=1, exponent=-36, dtype=torch.float32, outlier=None, zeros=False, group=1, side=(4, 3))
def test_int4_error_is_at_most_half_a_scale(seed, exponent, dtype, outlier, zeros, group, side):
    feature = draw_feature(
        seed, exponent=exponent, dtype=dtype, side=side, outlier=outlier, zeros=zeros
    )
    packed, scale = quantize_int4(feature, group=group)
    num = side[0] * side[1]
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, 5, -(-num // 2)))
    assert (scale.dtype, scale.shape) == (torch.float16, (3, 5, -(-num // group)))
    found = dequantize_int4(packed, scale, shape=tuple(feature.shape), group=group)
    error = (found.double() - feature.double()).abs()
    assert (error <= spread(scale, feature, group) * (0.5 + 2**-20)).all()
    padded = torch.nn.functional.pad(feature.double().flatten(2).abs(), (0, -num % group))
    largest = padded.unflatten(-1, (-1, group)).amax(dim=-1)
    assert (scale.double() <= largest / 7 * (1 + 2**-11) + 2**-24).all()


def test_int4_packs_two_positions_a_byte_the_first_in_the_low_half():
    feature = torch.tensor([7.0, -7.0, 0.0, 3.0, 1.0]).reshape(1, 1, 1, 5)
    packed, scale = quantize_int4(feature)
    assert packed.flatten().tolist() == [15 | 1 << 4, 8 | 11 << 4, 9]
    assert scale.item() == pytest.approx(1.0, rel=2**-9)


def test_int4_at_a_real_size_is_4_44_bits_a_value():
    packed, scale = quantize_int4(torch.ones(1, 1280, 12, 12))
    num_bytes = packed.nbytes + scale.nbytes
    assert num_bytes * 8 / (1280 * 144) == pytest.approx(4 + 16 / 36)


def test_int4_refuses_what_its_scales_cannot_hold():
    with pytest.raises(ValueError, match=r"within ±7 · 65504 .* got up to 500000"):
        quantize_int4(torch.full((1, 1, 2, 2), 5e5))
    with pytest.raises(ValueError, match="group must be at least 1 position, got 0"):
        quantize_int4(torch.ones(1, 1, 2, 2), group=0)
    packed, scale = quantize_int4(torch.ones(1, 1, 6, 6), group=6)
    with pytest.raises(ValueError, match=r"groups of 36 must be \(1, 1, 18\) and \(1, 1, 1\), got"):
        dequantize_int4(packed, scale, shape=(1, 1, 6, 6))
