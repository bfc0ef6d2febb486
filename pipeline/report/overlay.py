"""Masks and probability maps drawn on images, for people to look at.

Shape suffixes: H height, W width, C the three colour channels, red first.
"""

import base64
import io

import numpy as np
from PIL import Image

Color = tuple[int, int, int]

TINT: Color = (255, 92, 0)  # orange: apart from skin, sky and leaves alike
THRESHOLD = 0.5  # a probability above it counts as foreground
OUTLINE_SIDE_PX = 96  # the outline is one pixel wide for every 96 of the shorter side
RIM_OPACITY = 0.6
JPEG_QUALITY = 92

# matplotlib's magma at 0, 1/8 … 1: perceptually even, so equal steps look equal.
PROBABILITY_COLORS = np.array(
    [
        (0, 0, 4),
        (29, 17, 71),
        (81, 18, 124),
        (131, 38, 129),
        (183, 55, 121),
        (231, 82, 99),
        (252, 137, 97),
        (254, 196, 136),
        (252, 253, 191),
    ],
    dtype=np.float64,
)


def draw_overlay(
    image_HWC: np.ndarray, mask_HW: np.ndarray, *, color: Color = TINT, opacity: float = 0.5
) -> np.ndarray:
    """Tints what the mask covers and outlines it.

    Args:
        image_HWC: uint8 RGB.
        mask_HW: bool, or float probabilities in [0, 1]. A probability scales the tint; the
            outline runs along where it passes 0.5.
        color: RGB in 0..255 of tint and outline.
        opacity: of the tint at probability 1, in [0, 1].

    Returns:
        A new uint8 array of the image's shape. The outline lies inside the mask, is opaque, and
        has a dark rim outside, so that it shows on any ground; the image's frame gets none.

    Raises:
        ValueError: another shape or dtype, or a probability outside [0, 1] or NaN.
    """
    check_image(image_HWC)
    weight_HW = check_mask(mask_HW, image_HWC.shape[:2])
    inside_HW = weight_HW > THRESHOLD
    num_px = max(1, round(min(inside_HW.shape) / OUTLINE_SIDE_PX))
    rim_HW = _dilate(inside_HW, (num_px + 1) // 2) & ~inside_HW
    outline_HW = _dilate(~inside_HW, num_px) & inside_HW

    drawn_HWC = _blend(image_HWC.astype(np.float64), color, opacity * weight_HW)
    drawn_HWC = _blend(drawn_HWC, (0, 0, 0), RIM_OPACITY * rim_HW)
    drawn_HWC = _blend(drawn_HWC, color, outline_HW.astype(np.float64))
    return np.rint(drawn_HWC).astype(np.uint8)


def draw_probability(probability_HW: np.ndarray) -> np.ndarray:
    """A probability map as a picture, from black (0) over magenta to pale yellow (1).

    Args:
        probability_HW: float in [0, 1].

    Returns:
        uint8 RGB, (H, W, 3).

    Raises:
        ValueError: another shape or dtype, or a value outside [0, 1] or NaN.
    """
    weight_HW = check_mask(probability_HW, probability_HW.shape)
    stops = np.linspace(0.0, 1.0, len(PROBABILITY_COLORS))
    channels = [np.interp(weight_HW, stops, channel) for channel in PROBABILITY_COLORS.T]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def resize_for_display(array: np.ndarray, side_px: int) -> np.ndarray:
    """Brings an image, mask or probability map near a size for the screen.

    Args:
        array: (H, W, 3) uint8, (H, W) bool or (H, W) float in [0, 1].
        side_px: the longer side wanted.

    Returns:
        The same dtype (float32 for a float) and proportions. Small arrays have each pixel repeated
        a whole number of times, so that none is invented and edges stay crisp; the longer side
        then misses ``side_px`` by up to half a pixel of the array. From 1.5 times ``side_px`` on,
        pixels are averaged; a bool takes the side of the greater part.
    """
    height, width = array.shape[:2]
    side = max(height, width)
    if side <= 1.5 * side_px:
        factor = max(1, round(side_px / side))
        return array.repeat(factor, axis=0).repeat(factor, axis=1)
    size = (max(1, round(width * side_px / side)), max(1, round(height * side_px / side)))
    if array.dtype == np.uint8:
        return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BOX))
    weight = Image.fromarray(array.astype(np.float32)).resize(size, Image.Resampling.BOX)
    clipped_HW = np.clip(np.asarray(weight), 0, 1)
    return clipped_HW > THRESHOLD if array.dtype == np.bool_ else clipped_HW


def encode_data_uri(picture_HWC: np.ndarray) -> str:
    """A uint8 RGB picture as a ``data:`` URI for a web page.

    PNG (exact) or JPEG, whichever is smaller: flat scenes are one, photographs the other.
    """
    png, jpeg = io.BytesIO(), io.BytesIO()
    image = Image.fromarray(picture_HWC)
    image.save(png, "png", optimize=True)
    # No chroma subsampling: it would smear outlines.
    image.save(jpeg, "jpeg", quality=JPEG_QUALITY, subsampling=0)
    kind, data = min(
        ("png", png.getvalue()), ("jpeg", jpeg.getvalue()), key=lambda item: len(item[1])
    )
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def check_image(image_HWC: np.ndarray) -> None:
    """Raises ValueError unless the image is (H, W, 3) uint8."""
    if image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or image_HWC.dtype != np.uint8:
        raise ValueError(
            f"image must be (H, W, 3) uint8 RGB, but got {image_HWC.shape} {image_HWC.dtype}"
        )


def check_mask(mask_HW: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The mask as float64 weights in [0, 1].

    Raises:
        ValueError: not of ``shape``, neither bool nor float, or a value outside [0, 1] or NaN.
    """
    if mask_HW.ndim != 2 or mask_HW.shape != shape:
        raise ValueError(f"mask must be (H, W) = {shape}, but got {mask_HW.shape}; resize it first")
    if mask_HW.dtype != np.bool_ and not np.issubdtype(mask_HW.dtype, np.floating):
        raise ValueError(
            f"mask must be bool or float, but got {mask_HW.dtype}; "
            "pass mask.astype(bool), or the sigmoid of logits"
        )
    weight_HW = mask_HW.astype(np.float64)
    # Written so that NaN, which compares false, is refused too.
    if not np.all((weight_HW >= 0) & (weight_HW <= 1)):
        raise ValueError(
            "mask must hold probabilities in [0, 1], but got "
            f"{weight_HW.min():g} to {weight_HW.max():g}; take the sigmoid of logits"
        )
    return weight_HW


def _dilate(mask_HW: np.ndarray, num_px: int) -> np.ndarray:
    """Grows a mask by ``num_px`` pixels along both axes; nothing comes in from the frame."""
    for _ in range(num_px):
        grown_HW = mask_HW.copy()
        grown_HW[1:] |= mask_HW[:-1]
        grown_HW[:-1] |= mask_HW[1:]
        grown_HW[:, 1:] |= mask_HW[:, :-1]
        grown_HW[:, :-1] |= mask_HW[:, 1:]
        mask_HW = grown_HW
    return mask_HW


def _blend(under_HWC: np.ndarray, color: Color, opacity_HW: np.ndarray) -> np.ndarray:
    opacity_HW1 = opacity_HW[..., None]
    return under_HWC * (1 - opacity_HW1) + np.array(color, dtype=np.float64) * opacity_HW1
