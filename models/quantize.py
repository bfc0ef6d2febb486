"""The forms in which features are stored, as torch operations.

Shape suffixes: N rows, C channels, h/w a block's height and width.
"""

import torch
from torch import Tensor

INT8_MAX = 127


def quantize_int8(feature_NChw: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values (N, C, h, w) in [-127, 127] and their float32 scale (N, C).

    Symmetric, one scale a row and channel: scale = max|x| / 127, so the error is at most half a
    scale. A channel of zeros has scale 0 and comes back as zeros.
    """
    largest_NC = feature_NChw.abs().amax(dim=(-2, -1)).float()
    scale_NC = largest_NC / INT8_MAX
    divisor = torch.where(scale_NC > 0, scale_NC, 1.0)[..., None, None]
    quantized = (feature_NChw.float() / divisor).round().clamp(-INT8_MAX, INT8_MAX)
    return quantized.to(torch.int8), scale_NC


def dequantize_int8(quantized_NChw: Tensor, scale_NC: Tensor) -> Tensor:
    """Return float32 features (N, C, h, w) from int8 values and their scale (N, C)."""
    return quantized_NChw.float() * scale_NC[..., None, None]
