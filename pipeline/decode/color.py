"""Colour profiles (ICC) that images embed: what each is called, and its conversion to sRGB.

Little CMS, which comes with Pillow, reads them. What it cannot read, or what is of another colour
space than the pixels, cannot be applied: such an image is stored as one without a profile.
"""

import io
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from PIL import ImageCms

UNUSABLE = "unusable"
"""Stands for the name of a profile that cannot be applied."""
MAX_PROFILE_NAME = 100  # characters
_CLASSES = ("scnr", "mntr", "prtr", "spac")  # of an image's pixels; others join two conversions
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # as a profile's header spells them


def flat_mode(mode: str) -> str:
    """Return the Pillow mode of an image's colours alone: L, RGB or CMYK."""
    return "L" if mode in ("1", "L", "LA", "I;16") else "CMYK" if mode == "CMYK" else "RGB"


def read_profile(
    info: Mapping[Any, Any], mode: str, *, convert: bool
) -> tuple[str | None, ImageCms.ImageCmsTransform | None]:
    """Read the profile of an image in a Pillow mode: its name and the conversion, if wanted.

    ``info`` is the image's, where Pillow leaves None for a profile that it could not put together.
    The name is the profile's description, printable and of one line; ``UNUSABLE`` for one that
    cannot be applied; None without a profile. The conversion is from ``flat_mode`` to sRGB in RGB.
    Its rendering intent is perceptual, which differs from the colorimetric ones only for profiles
    with tables, such as printers'.
    """
    if "icc_profile" not in info:
        return None, None
    profile = info["icc_profile"] or b""
    name = _read_name(profile, _SPACES[flat_mode(mode)])
    if not convert or name == UNUSABLE:
        return name, None
    to_srgb = _build_transform(profile, flat_mode(mode))
    return (name, to_srgb) if to_srgb else (UNUSABLE, None)


def _read_name(profile: bytes, space: str) -> str:
    try:
        core = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
        if core.xcolor_space.strip() != space or core.device_class not in _CLASSES:
            return UNUSABLE
        name = core.profile_description or ""
    except (OSError, ValueError):  # also a description that is no Unicode
        return UNUSABLE
    printable = "".join(x if x.isprintable() else " " for x in name).strip()
    return printable[:MAX_PROFILE_NAME] or "unnamed"


@lru_cache(maxsize=4)  # one takes 10 ms, and most images of a corpus share a few
def _build_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(io.BytesIO(profile), srgb, mode, "RGB")
    except ImageCms.PyCMSError:
        return None
