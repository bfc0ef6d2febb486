"""Quantization of features to 8 and 4 bits, as torch operations.

Shape suffixes: N rows, C channels, h/w a block's height and width, P positions (h·w), G groups of
positions, K positions a group, B packed bytes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

INT8_MAX = 127
INT4_MAX = 7
INT4_GROUP = 36
_INT4_OFFSET = 8  # a nibble is value + 8, so 1 to 15
_MIN_SCALE = 2.0**-126  # float32's smallest normal: below it max|x| / 127 has lost its digits
_MAX_SCALE = float.fromhex("0x1.020406p+121")  # the largest of which 127 are finite in float32


def quantize_int8(feature_NChw: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values (N, C, h, w) in [-127, 127] and their float32 scale (N, C).

    Symmetric, one scale a row and channel: scale = max|x| / 127, or 2^-126 where that is less. The
    error |x - x'| is at most scale · (1/2 + 2^-15): half a step, and what three float32 operations
    round (quotient, scale, product: below 127 · 2^-24 of a step each). A channel of zeros has scale
    0 and comes back as zeros. One outlier sets its channel's scale: with the others below 1/254 of
    it they come back as zeros, within the bound.

    Args:
        feature_NChw: float32, float16 or bfloat16, finite; checking that is the caller's.
    """
    feature = feature_NChw.float()
    largest_NC = feature.abs().amax(dim=(-2, -1))
    scale_NC = (largest_NC / INT8_MAX).clamp(_MIN_SCALE, _MAX_SCALE)
    scale_NC = torch.where(largest_NC > 0, scale_NC, 0.0)
    divisor = torch.where(scale_NC > 0, scale_NC, 1.0)[..., None, None]
    quantized = (feature / divisor).round().clamp(-INT8_MAX, INT8_MAX)
    return quantized.to(torch.int8), scale_NC


def dequantize_int8(quantized_NChw: Tensor, scale_NC: Tensor) -> Tensor:
    """Return float32 features (N, C, h, w) from int8 values and their scale (N, C)."""
    return quantized_NChw.float() * scale_NC[..., None, None]


def quantize_int4(feature_NChw: Tensor, *, group: int = INT4_GROUP) -> tuple[Tensor, Tensor]:
    """Return 4-bit values, packed (N, C, ⌈P/2⌉) uint8, and their float16 scale (N, C, ⌈P/group⌉).

    No store offers it: ``ldznet bench storage`` prints its error beside float16's and int8's.
    Symmetric, values in [-7, 7]. Each ``group`` of consecutive positions (row by row) of a channel
    has one scale; the last group may be shorter. The first of two positions is a byte's low half.

    36 positions a group because that divides every block's at 384 px (36, 144, 576, 2304), so no
    scale is spent on a short group: 4 + 16/36 = 4.44 bits, 0.56 bytes a value, where groups of 32
    take 0.57 at 144 positions. The scale is max|x| / 7 in float16. Below float16's normal numbers
    it is rounded up, because rounding to the nearest would clip. The error |x - x'| is at most
    scale · (1/2 + 2^-20), the scale at most max|x| / 7 · (1 + 2^-11) + 2^-24.

    Args:
        feature_NChw: float32, float16 or bfloat16, finite.
        group: positions a scale, at least 1.

    Raises:
        ValueError: ``group`` is below 1, or a value is beyond 7 · 65,504, where float16 scales end.
    """
    if group < 1:
        raise ValueError(f"int4: group must be at least 1 position, got {group}")
    flat_NCP = feature_NChw.float().flatten(2)
    num = flat_NCP.shape[-1]
    groups_NCGK = F.pad(flat_NCP, (0, -num % group)).unflatten(-1, (-1, group))
    exact_NCG = groups_NCGK.abs().amax(dim=-1) / INT4_MAX
    # Half of float16's smallest step more: to the nearest then rounds up where steps are coarse.
    scale_NCG = (exact_NCG + 2.0**-25).to(torch.float16).clamp(min=2.0**-24)
    scale_NCG = torch.where(exact_NCG > 0, scale_NCG, 0.0)
    if not torch.isfinite(scale_NCG).all():
        raise ValueError(
            f"int4: values must be finite and within ±7 · 65504 (float16 scales), got up to "
            f"{float(flat_NCP.abs().max()):g}"
        )
    divisor = torch.where(scale_NCG > 0, scale_NCG.float(), 1.0)[..., None]
    values = (groups_NCGK / divisor).round().clamp(-INT4_MAX, INT4_MAX) + _INT4_OFFSET
    nibbles_NCP = F.pad(values.flatten(2)[..., :num].to(torch.uint8), (0, num % 2))
    return nibbles_NCP[..., 0::2] | (nibbles_NCP[..., 1::2] << 4), scale_NCG


def dequantize_int4(
    packed_NCB: Tensor, scale_NCG: Tensor, *, shape: tuple[int, ...], group: int = INT4_GROUP
) -> Tensor:
    """Return float32 features of ``shape`` (N, C, h, w) from what ``quantize_int4`` returned.

    Raises:
        ValueError: the arrays are not those of this shape and group.
    """
    rows, channels, height, width = shape
    num = height * width
    expected = (rows, channels, -(-num // 2)), (rows, channels, -(-num // group))
    got = tuple(packed_NCB.shape), tuple(scale_NCG.shape)
    if got != expected:
        raise ValueError(
            f"int4: values and scales of shape {shape} in groups of {group} must be {expected[0]} "
            f"and {expected[1]}, got {got[0]} and {got[1]}"
        )
    nibbles = torch.stack([packed_NCB & 15, packed_NCB >> 4], dim=-1).flatten(2)[..., :num]
    values_NCP = nibbles.float() - _INT4_OFFSET
    scale_NCP = scale_NCG.float().repeat_interleave(group, dim=-1)[..., :num]
    return (values_NCP * scale_NCP).reshape(shape)
