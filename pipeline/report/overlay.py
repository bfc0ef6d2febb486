"""Masks and probability maps drawn on images.

Shape suffixes: H height, W width, C the three colour channels, red first.
"""

import base64
import io

import numpy as np
from PIL import Image

Color = tuple[int, int, int]

TINT: Color = (255, 92, 0)  # orange: apart from skin, sky and leaves alike
THRESHOLD = 0.5  # a probability above it counts as foreground where no better one is known
OUTLINE_SIDE_PX = 96  # the outline is one pixel wide for every 96 of the shorter side
RIM_OPACITY = 0.6
JPEG_QUALITY = 92


def draw_overlay(
    image_HWC: np.ndarray,
    mask_HW: np.ndarray,
    *,
    color: Color = TINT,
    opacity: float = 0.5,
    threshold: float = THRESHOLD,
) -> np.ndarray:
    """Tint and outline what a mask covers.

    Args:
        image_HWC: uint8 RGB.
        mask_HW: bool, or float probabilities in [0, 1]. A probability scales the tint; the
            outline runs along where it passes ``threshold``.
        color: RGB in 0..255 of tint and outline.
        opacity: of the tint at probability 1, in [0, 1].

    Returns:
        A new uint8 array of the image's shape. The outline is opaque, lies inside the mask and
        has a dark rim outside, to be seen on any background. There is none along the frame.

    Raises:
        ValueError: another shape or dtype, or a probability outside [0, 1] or NaN.
    """
    check_image(image_HWC)
    weight_HW = check_mask(mask_HW, image_HWC.shape[:2])
    inside_HW = weight_HW > threshold
    num_px = max(1, round(min(inside_HW.shape) / OUTLINE_SIDE_PX))
    rim_HW = _dilate(inside_HW, (num_px + 1) // 2) & ~inside_HW
    outline_HW = _dilate(~inside_HW, num_px) & inside_HW

    drawn_HWC = _blend(image_HWC.astype(np.float64), color, opacity * weight_HW)
    drawn_HWC = _blend(drawn_HWC, (0, 0, 0), RIM_OPACITY * rim_HW)
    drawn_HWC = _blend(drawn_HWC, color, outline_HW.astype(np.float64))
    return np.rint(drawn_HWC).astype(np.uint8)


def resize_for_display(array: np.ndarray, side_px: int) -> np.ndarray:
    """Resize an image, mask or probability map for the screen.

    Args:
        array: (H, W, 3) uint8, (H, W) bool or (H, W) float in [0, 1].
        side_px: the longer side wanted.

    Returns:
        The same dtype (float32 for a float) and proportions. In a small array each pixel is
        repeated a whole number of times, so that edges stay crisp; the longer side is then
        ``side_px`` up to half a pixel of the array. In an array of more than 1.5 times ``side_px``
        pixels are averaged; a bool becomes what most of its pixels are.
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
    """Raise ValueError unless the image is (H, W, 3) uint8."""
    if image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or image_HWC.dtype != np.uint8:
        raise ValueError(
            f"image must be (H, W, 3) uint8 RGB, but got {image_HWC.shape} {image_HWC.dtype}"
        )


def check_mask(mask_HW: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the mask as float64 weights in [0, 1].

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
    """Grow a mask by ``num_px`` pixels along both axes; nothing comes in from the frame."""
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
