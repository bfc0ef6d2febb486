"""Cuts views from a source image: squares at the model's size, and the masks alike.

A crop is a box of the source; a view is a crop at the model's size, plain or mirrored. Imports only
numpy and Pillow, for the decode worker; phrases and prompts are known by their numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from models.ldm.draws import draw_integer

MAX_CROP_TRIES = 50  # as LD-ZNet's training crop
MIN_CROP_MASK = 0.05  # least share of the square that the mask covers, as there
MAX_VIEW_PX = 4096  # the largest size that a spec may have


class Box(NamedTuple):
    """A crop in source pixels: left and top inside, right and bottom outside."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True, slots=True)
class SourceImage:
    """A view's source in the index: its sample's key, its size in pixels, its digest in hex.

    ``orientation``: EXIF's, applied or not. ``color_profile``: the name of the embedded one.
    """

    key: str
    width: int
    height: int
    sha256: str
    orientation: int = 1
    color_profile: str | None = None


@dataclass(frozen=True, slots=True)
class Cutting:
    """The fields of ``LatentsSpec`` that decide a sample's views, the pixels included."""

    size: int
    crop: Literal["center", "resize", "phrase"]
    views: int
    flip: bool
    num_prompts: int
    seed: int
    orientation: Literal["apply", "ignore"] = "apply"
    color: Literal["raw", "srgb"] = "raw"

    @property
    def num_mirrored(self) -> int:
        """How many views a crop has: itself and, with ``flip``, its mirror image."""
        return 1 + self.flip


@dataclass(frozen=True, slots=True)
class Cut:
    """A phrase in a crop.

    ``shown``: whether the crop's view has a pixel of its mask. ``prompts``: the number of its
    prompt in each of the crop's views, 0 if not shown. ``needs_px``: of a mask that is too thin for
    the view, though the crop has pixels of it, a larger size that shows some; 0 of all others.
    """

    phrase: int
    box: Box
    shown: bool
    prompts: tuple[int, ...]
    needs_px: int = 0


@dataclass(frozen=True, slots=True)
class ViewPlan:
    """A view without its pixels.

    ``number`` counts the views of an image; ``cuts`` are the positions, in the sample's list of
    cuts, of those that it shows, and ``prompts`` their prompts' numbers. Both are empty for a
    sample without masks, all of whose phrases its views have.
    """

    number: int
    flipped: bool
    box: Box
    cuts: tuple[int, ...]
    prompts: tuple[int, ...]


class ViewPixels(NamedTuple):
    """A view's pixels: ``image`` (size, size, 3) uint8, and uint8 of 0 and 1 (size, size) else.

    ``masks`` has one a cut; ``ignore`` is None for an image without an ignore region.
    """

    image: np.ndarray
    masks: list[np.ndarray]
    ignore: np.ndarray | None = None


def centre_box(width: int, height: int) -> Box:
    """Return the largest centred square."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return Box(left, top, left + side, top + side)


def whole_box(width: int, height: int) -> Box:
    """Return the box of the whole image, which the view squeezes to a square."""
    return Box(0, 0, width, height)


def phrase_box(mask_HW: np.ndarray, draw: Callable[..., int]) -> Box:
    """Return a random square of the shorter side that shows enough of the mask (H, W) bool.

    ``draw(low, high, draw=number)`` returns the random integer of this number in [low, high).
    It is the first of 50 tries that the mask covers by over 5 %, else the one that it covers most,
    as in LD-ZNet's training crop.
    """
    height, width = mask_HW.shape
    side = min(width, height)
    best, best_share = centre_box(width, height), -1.0
    for number in range(MAX_CROP_TRIES):
        left = draw(0, width - side + 1, draw=2 * number)
        top = draw(0, height - side + 1, draw=2 * number + 1)
        box = Box(left, top, left + side, top + side)
        share = float(mask_HW[box.top : box.bottom, box.left : box.right].mean())
        if share > best_share:
            best, best_share = box, share
        if share > MIN_CROP_MASK or (width == side and height == side):
            break
    return best


def cut_image(image: Image.Image, box: Box, *, size: int) -> np.ndarray:
    """Return the plain view (size, size, 3) uint8, resized bilinearly with antialiasing."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def cut_mask(mask_HW: np.ndarray, box: Box, *, size: int) -> np.ndarray:
    """Return the plain view's mask (size, size) uint8 of 0 and 1, by nearest neighbour."""
    mask = Image.fromarray(mask_HW.view(np.uint8))
    return np.asarray(mask.resize((size, size), Image.Resampling.NEAREST, box=box))


def cut_phrase(
    mask_HW: np.ndarray, phrase: int, cutting: Cutting, *, key: str
) -> Iterator[tuple[Cut, np.ndarray]]:
    """Yield, for each crop of a phrase, its cut and its mask (size, size) uint8 of 0 and 1.

    ``mask_HW`` (H, W) bool is the mask of the phrase's number ``phrase``, of the sample ``key``.
    """
    for number in range(phrase * cutting.views, (phrase + 1) * cutting.views):
        crop = number if cutting.crop == "phrase" else 0
        box = _choose_box(mask_HW, cutting, key=key, crop=crop)
        mask = cut_mask(mask_HW, box, size=cutting.size)
        shown = bool(mask.any())
        views = range(crop * cutting.num_mirrored, (crop + 1) * cutting.num_mirrored)
        prompts = tuple(choose_prompt(cutting, key, view, phrase) if shown else 0 for view in views)
        needs_px = 0 if shown else _find_size(mask_HW, box, cutting.size)
        yield Cut(phrase, box, shown, prompts, needs_px), mask


def _find_size(mask_HW: np.ndarray, box: Box, size: int) -> int:
    """Return the first doubling of ``size`` that shows a mask; 0 if the box has no pixel of it.

    The first above ``MAX_VIEW_PX`` stands for none.
    """
    if not mask_HW[box.top : box.bottom, box.left : box.right].any():
        return 0
    larger = 2 * size
    while larger <= MAX_VIEW_PX and not cut_mask(mask_HW, box, size=larger).any():
        larger *= 2
    return larger


def plan_views(
    cuts: Sequence[Cut], cutting: Cutting, *, width: int, height: int
) -> Iterator[ViewPlan]:
    """Yield the views of a sample's cuts (those of ``cut_phrase``, phrase after phrase), in order.

    An image's views are numbered from 0: each crop, and with ``flip`` its mirror image after it. A
    crop that shows no phrase has no view. A sample without masks, and so without cuts, has one
    crop: with ``crop: phrase`` the centre's. ``width`` and ``height`` are the image's.
    """
    if not cuts:
        fit = whole_box if cutting.crop == "resize" else centre_box
        for number in range(cutting.num_mirrored):
            yield ViewPlan(number, number == 1, fit(width, height), (), ())
        return
    places = range(len(cuts))
    for crop, members in enumerate([[i] for i in places] if cutting.crop == "phrase" else [places]):
        shown = tuple(i for i in members if cuts[i].shown)
        if not shown:
            continue
        for mirrored in range(cutting.num_mirrored):
            yield ViewPlan(
                number=crop * cutting.num_mirrored + mirrored,
                flipped=mirrored == 1,
                box=cuts[shown[0]].box,
                cuts=shown,
                prompts=tuple(cuts[i].prompts[mirrored] for i in shown),
            )


def render_views(
    image: Image.Image,
    cuts: Sequence[Cut],
    masks: Sequence[np.ndarray],
    cutting: Cutting,
    ignore_HW: np.ndarray | None = None,
) -> Iterator[ViewPixels]:
    """Cut the pixels of every planned view, in order, from an RGB image and ``cuts``' plain masks.

    ``ignore_HW`` is the image's ignore region, (H, W) bool, where there is one.
    """
    plain = ViewPixels(np.empty(0), [])
    for view in plan_views(cuts, cutting, width=image.width, height=image.height):
        if view.flipped:  # it follows its crop's plain view
            ignore = None if plain.ignore is None else mirror(plain.ignore)
            yield ViewPixels(mirror(plain.image), [mirror(masks[i]) for i in view.cuts], ignore)
            continue
        ignore = None if ignore_HW is None else cut_mask(ignore_HW, view.box, size=cutting.size)
        pixels = cut_image(image, view.box, size=cutting.size)
        plain = ViewPixels(pixels, [masks[i] for i in view.cuts], ignore)
        yield plain


def mirror(pixels: np.ndarray) -> np.ndarray:
    """Return an image or a mask flipped left to right, contiguous."""
    return np.ascontiguousarray(pixels[:, ::-1])


def _choose_box(mask_HW: np.ndarray, cutting: Cutting, *, key: str, crop: int) -> Box:
    height, width = mask_HW.shape
    if cutting.crop == "center":
        return centre_box(width, height)
    if cutting.crop == "resize":
        return whole_box(width, height)
    draw = partial(draw_integer, purpose="crop", seed=cutting.seed, key=key, view=crop)
    return phrase_box(mask_HW, draw)


def choose_prompt(cutting: Cutting, key: str, view: int, phrase: int) -> int:
    """Return the number of the prompt that a phrase has in a view, by the phrase's number."""
    if cutting.num_prompts == 1:
        return 0
    draw = partial(draw_integer, purpose="prompt", seed=cutting.seed, key=key, view=view)
    return draw(0, cutting.num_prompts, draw=phrase)
