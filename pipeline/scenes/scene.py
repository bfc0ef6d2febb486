"""The embedded demo corpus: scenes that the project draws itself, with phrases and masks.

``draw_scene`` places 2-5 objects, paints them over a background and chooses a few of the phrases
that are true of some; ``write_corpus`` stores scenes as WebDataset tars: a JPEG, a JSON and a PNG
for each mask. Most objects are near copies of one another: beside the red circle lies a red square
or a blue circle, so a mask is found only by understanding the whole phrase. A scene depends on
(seed, split, index) alone.
"""

import io
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset import TarWriter

from pipeline.base.whole_file import open_whole
from pipeline.scenes.drawing import (
    COLOURS,
    RADII,
    SHAPES,
    TEXTURES,
    SceneObject,
    draw_background,
    draw_object,
    paste_patch,
)
from pipeline.scenes.looks import STANDARD, Look, finish_image, open_look_stream, restyle_background
from pipeline.scenes.phrases import PLACES, choose_phrases, list_phrases

# What the nine prompt templates of LD-ZNet add around a phrase ("a cropped photo of a {}." ...).
TEMPLATE_WORDS = (
    *("a", "an", "bad", "cropped", "good", "image", "of", "one", "photo", "photograph", "the"),
)
# A visible mask below this fraction of the image is a layout to reject.
MIN_MASK_FRACTION = 0.005
# An object hidden by more than this is no longer known by its shape.
_MIN_VISIBLE_FRACTION = 0.6
_MIN_SIZE_PX = 32
_MAX_OBJECTS = 5
_JPEG_QUALITY = 92
_SPLIT = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass(frozen=True)
class Scene:
    """An image with its phrases and their masks, in the same order.

    ``image`` is (H, W, 3) uint8 RGB; each of ``masks`` is (H, W) bool, the visible pixels of all
    objects that the phrase is true of. ``objects`` are what it was drawn from, in drawing order;
    ``owner`` (H, W) int8 is the number of the object that shows at a pixel, -1 where none does.
    """

    image: NDArray[np.uint8]
    phrases: tuple[str, ...]
    masks: tuple[NDArray[np.bool_], ...]
    objects: tuple[SceneObject, ...]
    owner: NDArray[np.int8]


def list_words() -> tuple[str, ...]:
    """Every word of any phrase and of the nine prompt templates, sorted, lower case."""
    return tuple(sorted({*SHAPES, "shape", *COLOURS, *TEXTURES, *RADII, *PLACES, *TEMPLATE_WORDS}))


def draw_scene(
    *,
    seed: int,
    split: str,
    index: int,
    size_px: int = 128,
    look: Look = STANDARD,
    num_objects: int | None = None,
) -> Scene:
    """Draw scene ``index`` of a split; the same arguments always give the same scene.

    ``look`` changes the drawing alone, not objects, phrases and masks. ``num_objects`` None draws
    2 to 5 of them.

    Raises:
        ValueError: ``size_px`` is under 32, ``seed`` or ``index`` negative, ``split`` not a
            lower-case word, or ``num_objects`` not in 1 to 5.
    """
    _check_arguments(seed=seed, split=split, index=index, size_px=size_px)
    if num_objects is not None and not 1 <= num_objects <= _MAX_OBJECTS:
        raise ValueError(f"num_objects must be in 1 to {_MAX_OBJECTS}, but got {num_objects}")
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(split.encode()), index]))
    for _ in range(1000):
        objects = _place_objects(rng, num_objects)
        look_rng = open_look_stream(look, seed=seed, split=split, index=index)
        scene = _render(objects, rng, size_px, look, look_rng) if objects else None
        if scene is not None:
            return scene
    raise AssertionError(f"no layout was accepted for seed {seed}, split {split}, index {index}")


def write_corpus(
    folder: Path,
    *,
    split: str,
    num_images: int,
    images_per_tar: int,
    seed: int = 0,
    size_px: int = 128,
    look: Look = STANDARD,
    keep: bool = False,
) -> list[Path]:
    """Write scenes 0 to ``num_images`` - 1 of a split as tars and return their paths in order.

    The tars are ``scenes-<split>-00000.tar`` and so on. The same arguments give the same bytes.

    Raises:
        ValueError: a count is under 1, or an argument is one that ``draw_scene`` refuses.
    """
    for name, count in (("num_images", num_images), ("images_per_tar", images_per_tar)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, but got {count}")
    _check_arguments(seed=seed, split=split, index=0, size_px=size_px)

    def draw(index: int) -> Scene:
        return draw_scene(seed=seed, split=split, index=index, size_px=size_px, look=look)

    return write_tars(folder, "scenes", split, draw, num_images, images_per_tar, keep=keep)


def write_tars(
    folder: Path,
    name: str,
    split: str,
    draw: Callable[[int], Scene],
    num_images: int,
    images_per_tar: int,
    *,
    keep: bool,
) -> list[Path]:
    """Write the scenes that ``draw`` returns for 0 to ``num_images`` - 1 as tars.

    These are ``<name>-<split>-00000.tar`` and so on, and appear under their names when they are
    whole. With ``keep``, those that are there stay. Returns their paths in order.
    """
    paths = []
    for number, first in enumerate(range(0, num_images, images_per_tar)):
        path = folder / f"{name}-{split}-{number:05d}.tar"
        paths.append(path)
        if keep and path.exists():
            continue
        with (
            open_whole(path) as file,
            TarWriter(file, encoder=False, user="ldznet", group="ldznet", mtime=0) as tar,
        ):
            for index in range(first, min(first + images_per_tar, num_images)):
                tar.write(encode_sample(f"{split}-{index:06d}", draw(index)))
    return paths


def _check_arguments(*, seed: int, split: str, index: int, size_px: int) -> None:
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be at least 0, but got {seed} and {index}")
    if not _SPLIT.fullmatch(split):
        raise ValueError(f"split must match {_SPLIT.pattern}, but got {split!r}")
    if size_px < _MIN_SIZE_PX:
        raise ValueError(f"size_px must be at least {_MIN_SIZE_PX}, but got {size_px}")


def encode_sample(key: str, scene: Scene) -> dict[str, str | bytes]:
    """The files of one sample by extension, as ``TarWriter`` takes them."""
    jpeg = io.BytesIO()
    Image.fromarray(scene.image).save(jpeg, format="JPEG", quality=_JPEG_QUALITY)
    sample: dict[str, str | bytes] = {"__key__": key, "jpg": jpeg.getvalue()}
    sample["json"] = json.dumps({"phrases": list(scene.phrases)}).encode()
    for number, mask in enumerate(scene.masks):
        png = io.BytesIO()
        Image.fromarray(mask).save(png, format="PNG")  # a bool array becomes a 1-bit image
        sample[f"mask{number}.png"] = png.getvalue()
    return sample


def _place_objects(rng: np.random.Generator, num_objects: int | None) -> list[SceneObject] | None:
    """Return objects in drawing order, or None where one found no room."""
    if num_objects is None:
        num_objects = int(rng.choice([2, 3, 4, 5], p=[0.15, 0.3, 0.35, 0.2]))
    objects: list[SceneObject] = []
    for _ in range(num_objects):
        wanted = _choose_attributes(rng, objects)
        for _ in range(30):
            placed = _try_place(rng, wanted, objects)
            if placed is not None:
                objects.append(placed)
                break
        else:
            return None
    return [objects[i] for i in rng.permutation(num_objects)]


def _choose_attributes(rng: np.random.Generator, objects: list[SceneObject]) -> SceneObject:
    """An object without a place: new, or a copy of another with 0 to 2 attributes changed."""
    fresh = SceneObject(
        shape=str(rng.choice(SHAPES)),
        colour=str(rng.choice(list(COLOURS))),
        texture=str(rng.choice(TEXTURES)),
        size=str(rng.choice(list(RADII), p=[0.45, 0.55])),
        x=0.0,
        y=0.0,
        radius=0.0,
    )
    if not objects or rng.random() < 0.15:
        return fresh
    model = objects[int(rng.integers(len(objects)))]
    num_changed = int(rng.choice(3, p=[0.15, 0.5, 0.35]))
    kinds = ("shape", "colour", "texture", "size")
    changed = rng.choice(kinds, size=num_changed, replace=False, p=[0.3, 0.3, 0.22, 0.18])
    return replace(fresh, **{k: getattr(model, k) for k in kinds if k not in changed})


def _try_place(
    rng: np.random.Generator, wanted: SceneObject, objects: list[SceneObject]
) -> SceneObject | None:
    """The object at a random place, often touching another, or None where that place is taken."""
    radius = rng.uniform(*RADII[wanted.size])
    x, y = rng.uniform(radius, 1.0 - radius, size=2)
    if objects and rng.random() < 0.65:
        near = objects[int(rng.integers(len(objects)))]
        angle = rng.uniform(0, 2 * np.pi)
        distance = rng.uniform(0.74, 0.95) * (radius + near.radius)
        x, y = near.x + distance * np.cos(angle), near.y + distance * np.sin(angle)
    if not (radius <= x <= 1 - radius and radius <= y <= 1 - radius):
        return None
    if any(np.hypot(x - o.x, y - o.y) < 0.74 * (radius + o.radius) for o in objects):
        return None
    # A square or a cross turned by 45 degrees, or a triangle by 60, would read as something else.
    turn = rng.uniform(-np.pi, np.pi) if wanted.shape == "star" else rng.uniform(-0.3, 0.3)
    red, green, blue = rng.uniform(-10.0, 10.0, size=3).tolist()
    return replace(
        wanted,
        x=float(x),
        y=float(y),
        radius=radius,
        turn_rad=turn,
        grain_rad=rng.uniform(0.0, np.pi),
        period=rng.uniform(0.058, 0.075),
        tint=(red, green, blue),
    )


def _render(
    objects: list[SceneObject],
    rng: np.random.Generator,
    size_px: int,
    look: Look,
    look_rng: np.random.Generator,
) -> Scene | None:
    """Paint the objects and choose phrases; None where too little of an object shows.

    ``rng`` draws what belongs to the scene, ``look_rng`` what belongs to the look.
    """
    canvas = restyle_background(draw_background(rng, size_px=size_px), look, look_rng)
    owner = np.full((size_px, size_px), -1, dtype=np.int8)
    num_whole = []
    for number, scene_object in enumerate(objects):
        patch = draw_object(scene_object, size_px=size_px, look=look)
        paste_patch(canvas, owner, patch, number=number, shadow=look.shadow)
        num_whole.append(int((patch.coverage >= 0.5).sum()))
    num_visible = np.bincount(owner.ravel() + 1, minlength=len(objects) + 1)[1:]
    fewest = np.maximum(_MIN_VISIBLE_FRACTION * np.array(num_whole), MIN_MASK_FRACTION * owner.size)
    if (num_visible < fewest).any():
        return None
    canvas += rng.standard_normal((size_px, size_px, 1), dtype=np.float32) * np.float32(2.5)
    canvas = finish_image(canvas, look, look_rng)
    true_of = list_phrases(objects)
    phrases = choose_phrases(rng, true_of, len(objects))
    return Scene(
        image=np.clip(np.rint(canvas), 0, 255).astype(np.uint8),
        phrases=phrases,
        masks=tuple(np.isin(owner, list(true_of[phrase])) for phrase in phrases),
        objects=tuple(objects),
        owner=owner,
    )
