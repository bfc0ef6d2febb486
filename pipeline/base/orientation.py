"""EXIF's orientation: how the stored pixels are turned upright."""

import numpy as np


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W, ...) as EXIF 2.32, tag 0x0112, says with a number of 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
