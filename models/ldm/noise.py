"""Diffusion noise that depends on what it is for, never on who computes it.

The stream is that of ``models.ldm.draws`` and the normal transform is ours, so a stored feature can
be recomputed by any later version on any device.
"""

import numpy as np
import torch
from torch import Tensor

from models.ldm.draws import draw_integer, open_stream

__all__ = ["draw_integer", "draw_noise"]


def draw_noise(shape: tuple[int, ...], *, seed: int, key: str, view: int, draw: int) -> Tensor:
    """Return standard normal noise of ``shape``, float32 on the CPU, for one draw of one view.

    Box and Muller (1958) in float64 over pairs of 53-bit uniforms, rounded to float32.
    """
    num = int(np.prod(shape))
    num_pairs = (num + 1) // 2
    raw = open_stream("noise", seed=seed, key=key, view=view, draw=draw).random_raw(2 * num_pairs)
    uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log1p(-uniform[:num_pairs]))  # 1 - u lies in (0, 1]
    angle = 2.0 * np.pi * uniform[num_pairs:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:num]
    return torch.from_numpy(normal.astype(np.float32).reshape(shape))
