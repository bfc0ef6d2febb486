"""Decodes a mask's PNG to bool, by stated rules; what they cannot tell is refused.

- grey, of 1 to 16 bits: foreground is 1 where the values are 0 and 1, and the range's largest where
  they are 0 and that (in 16 bits 255 too). Of other values at least half of the range is foreground
  (128 of 0-255, 32768 of 0-65535), and ``Mask.by_half_value`` says so.
- palette: at most two indices are in use. If one of the two colours is black and the other is not,
  black is background, whatever the order; else index 0 is. An index alone is background if it is
  black, or 0 and not white.
- transparency is not looked at, but foreground that is fully transparent is refused.
- orientation, colour profile and gamma: not looked at.
"""

from typing import Literal, NamedTuple

import numpy as np
from PIL import ImageFile

from pipeline.corpus.members import MAX_METADATA_BYTES
from pipeline.decode.images import (
    BadImageError,
    load_pixels,
    open_picture,
    read_palette,
    read_values,
    refusing_damage,
)

_CLASS_MAP = "a map of classes goes in by ldznet ingest labels"


class Mask(NamedTuple):
    """A decoded mask.

    ``pixels``: (H, W) bool, True for foreground. ``by_half_value``: the values were not 0 and one
    of those that mean foreground, so that half of the range decided.
    """

    pixels: np.ndarray
    by_half_value: bool = False


def decode_mask(
    data: bytes,
    *,
    size: tuple[int, int],
    turn: int = 1,
    orientation: Literal["apply", "ignore"] = "apply",
    max_metadata_bytes: int = MAX_METADATA_BYTES,
    may_be_empty: bool = False,
) -> Mask:
    """Decode a mask's PNG.

    ``size`` is the height and width of the image that the mask belongs to, ``turn`` the orientation
    in its EXIF, which was applied or not: then the mask is of the pixels as they are stored.
    ``may_be_empty``: all background is no error, as for a region to ignore.

    Raises:
        BadImageError: "wrong_size", "empty" without foreground, "corrupt" for all else.
        RuntimeError: some library has turned on Pillow's ``LOAD_TRUNCATED_IMAGES``.
    """
    with refusing_damage():
        image = open_picture(data, ["PNG"], max_metadata_bytes)
        _check_size(image.size, size, turn, orientation)
        if image.mode not in ("1", "L", "I;16", "P"):
            advice = f"save it as 1-bit or grey; {_CLASS_MAP}"
            detail = f"expected 1-bit, grey or palette pixels, got {image.mode}: {advice}"
            raise BadImageError("corrupt", detail)
        load_pixels(image, data)
        mask, what = _split_palette(image, data) if image.mode == "P" else _split_grey(image, data)
    if not mask.pixels.any() and (mask.by_half_value or not may_be_empty):
        raise BadImageError("empty", what)
    return mask


def _check_size(
    found: tuple[int, int],
    size: tuple[int, int],
    turn: int,
    orientation: Literal["apply", "ignore"],
) -> None:
    """Refuse a mask of ``found`` (width, height) for an image of ``size`` (height, width)."""
    width, height = found
    if (height, width) == size:
        return
    turned = {"apply": " once upright", "ignore": " stored"}[orientation] * (turn != 1)
    detail = f"expected {size[1]}x{size[0]} as the image is{turned}, got {width}x{height}"
    if turn > 4 and (width, height) == size:  # EXIF's turns that swap width and height
        other = "ignore" if orientation == "apply" else "apply"
        detail += f"; EXIF turns it ({turn}): the mask fits with orientation: {other}"
    raise BadImageError("wrong_size", detail)


def _split_grey(image: ImageFile.ImageFile, data: bytes) -> tuple[Mask, str]:
    """Return the mask of grey pixels, and what to say of it if it is empty."""
    num_bits = data[24]
    most = (1 << num_bits) - 1
    values = read_values(image, data)
    largest = int(values.max())
    foreground = values == largest
    plain = largest in (0, 1, most) or (num_bits == 16 and largest == 255)
    if plain and (foreground | (values == 0)).all():
        foreground &= largest > 0
        what = "every pixel is 0"
    else:
        plain, half = False, (most + 1) // 2
        foreground = values >= half
        what = f"no value of {half} or more; the largest is {largest}; {_CLASS_MAP}"
    if (key := image.info.get("transparency")) is not None:
        _check_opaque(values[foreground], {key & most})
    return Mask(foreground, by_half_value=not plain), what


def _split_palette(image: ImageFile.ImageFile, data: bytes) -> tuple[Mask, str]:
    """Return the mask of a palette's indices, and what to say of it if it is empty."""
    indices = np.array(image)  # uint8 (H, W)
    colours = read_palette(indices, data)
    used = [index for index, number in enumerate(image.histogram()) if number]
    if len(used) > 2:
        shown = ", ".join(map(str, used[:10])) + ", ..." * (len(used) > 10)
        detail = f"expected at most two palette indices, got {len(used)}: {shown}; {_CLASS_MAP}"
        raise BadImageError("corrupt", detail)
    background = _find_background({index: colours[index] for index in used})
    foreground = indices != background
    alpha = image.info.get("transparency", b"")  # of the first indices, or the only clear index
    clear = {alpha} if isinstance(alpha, int) else {i for i, value in enumerate(alpha) if not value}
    _check_opaque(indices[foreground], clear)
    return Mask(foreground), f"every pixel is of palette index {used[0]}, which is background"


def _find_background(used: dict[int, tuple[int, int, int]]) -> int:
    """Return which of one or two indices in use is background, by their colours; -1 for none."""
    black = [index for index, colour in used.items() if colour == (0, 0, 0)]
    if len(black) == 1:  # also where an optimizer has ordered the palette anew
        return black[0]
    if len(used) == 2 and 0 not in used:
        described = ", ".join(f"{index} ({colour})" for index, colour in used.items())
        detail = f"expected index 0 or a black colour as the background, got {described}"
        raise BadImageError("corrupt", f"{detail}; {_CLASS_MAP}")
    lone_white = list(used.values()) == [(255, 255, 255)]
    return 0 if 0 in used and not lone_white else -1


def _check_opaque(foreground: np.ndarray, clear: set[int]) -> None:
    if clear and (found := clear & set(np.unique(foreground).tolist())):
        detail = f"the foreground (value {min(found)}) is transparent: save it without transparency"
        raise BadImageError("corrupt", detail)
