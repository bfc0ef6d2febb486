"""Diffusion noise and timesteps that depend on what they are for, never on who computes them.

Every draw comes from Philox keyed by SHA-256 over (purpose, seed, key, view, draw). Philox's raw
64-bit stream is stable across NumPy versions (NEP 19), and the normal transform is ours, so a
stored feature can be recomputed by any later version on any device.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def _raw_stream(purpose: str, *, seed: int, key: str, view: int, draw: int) -> np.random.Philox:
    text = "\0".join(("ldznet", purpose, str(seed), key, str(view), str(draw)))
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def draw_noise(shape: tuple[int, ...], *, seed: int, key: str, view: int, draw: int) -> Tensor:
    """Return standard normal noise of ``shape``, float32 on the CPU, for one draw of one view.

    Box and Muller (1958) in float64 over pairs of 53-bit uniforms, rounded to float32.
    """
    num = int(np.prod(shape))
    num_pairs = (num + 1) // 2
    raw = _raw_stream("noise", seed=seed, key=key, view=view, draw=draw).random_raw(2 * num_pairs)
    uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log1p(-uniform[:num_pairs]))  # 1 - u lies in (0, 1]
    angle = 2.0 * np.pi * uniform[num_pairs:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:num]
    return torch.from_numpy(normal.astype(np.float32).reshape(shape))


def draw_integer(
    low: int, high: int, *, purpose: str, seed: int, key: str, view: int, draw: int
) -> int:
    """Return one integer uniform in [low, high) for one draw of one view.

    The 64-bit remainder's bias is below 1e-15 for any range used here.
    """
    raw = _raw_stream(purpose, seed=seed, key=key, view=view, draw=draw).random_raw(1)
    return low + int(raw[0]) % (high - low)
