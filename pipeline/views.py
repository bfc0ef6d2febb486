"""Views: squares of a source image at the model's size, with the masks cut alike."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_CROP_TRIES = 50  # LD-ZNet's training crop: first of 50 tries with enough of the mask
MIN_CROP_MASK = 0.05  # "enough": share of the square that the mask covers

DrawInteger = Callable[[int, int, int], int]  # (number of the draw, low, high) -> [low, high)


@dataclass(frozen=True, slots=True)
class Box:
    """A crop in source pixels: left and top inside, right and bottom outside."""

    left: int
    top: int
    right: int
    bottom: int


def centre_box(width: int, height: int) -> Box:
    """Return the largest centred square."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return Box(left, top, left + side, top + side)


def whole_box(width: int, height: int) -> Box:
    """Return the whole image, which a view then squeezes to a square."""
    return Box(0, 0, width, height)


def phrase_box(mask_HW: np.ndarray, draw: DrawInteger) -> Box:
    """Return a random square of the shorter side that holds enough of the mask (H, W) bool.

    The first of 50 tries with the mask over 5 % of it, else the try that holds most of it, as
    LD-ZNet's training crop.
    """
    height, width = mask_HW.shape
    side = min(width, height)
    best, best_share = centre_box(width, height), -1.0
    for number in range(MAX_CROP_TRIES):
        left = draw(2 * number, 0, width - side + 1)
        top = draw(2 * number + 1, 0, height - side + 1)
        box = Box(left, top, left + side, top + side)
        share = float(mask_HW[box.top : box.bottom, box.left : box.right].mean())
        if share > best_share:
            best, best_share = box, share
        if share > MIN_CROP_MASK or (width == side and height == side):
            break
    return best


def cut_image(image_HWC: np.ndarray, box: Box, *, size: int, flip: bool) -> np.ndarray:
    """Return the view (size, size, 3) uint8, resized bilinearly with antialiasing."""
    view = Image.fromarray(image_HWC).resize(
        (size, size),
        Image.Resampling.BILINEAR,
        box=(box.left, box.top, box.right, box.bottom),
    )
    array = np.asarray(view)
    return np.ascontiguousarray(array[:, ::-1]) if flip else array


def cut_mask(mask_HW: np.ndarray, box: Box, *, size: int, flip: bool) -> np.ndarray:
    """Return the view's mask (size, size) uint8 of 0 and 1, resized by nearest neighbour."""
    view = Image.fromarray(mask_HW.astype(np.uint8)).resize(
        (size, size),
        Image.Resampling.NEAREST,
        box=(box.left, box.top, box.right, box.bottom),
    )
    array = np.asarray(view)
    return np.ascontiguousarray(array[:, ::-1]) if flip else array
