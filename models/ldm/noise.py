"""Diffusion noise that follows from the seed, the view and the draw alone.

The random bits are those of ``models.ldm.draws`` and the normal transform stands here, so that any
later version can recompute a stored feature on any device.
"""

import numpy as np
import torch
from torch import Tensor

from models.ldm.draws import open_stream


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
