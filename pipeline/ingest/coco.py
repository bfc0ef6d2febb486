"""COCO's and LVIS's ``instances_*.json``: a class is a phrase, its mask all annotations of it.

A crowd's run lengths join their class's mask, for they are no instance's. An annotation without an
outline (COCO has some) adds nothing to it. Left out and counted: images without annotation, and of
LVIS the classes that an image names as not exhaustively marked.

The file is read once and whole; polygons are kept as 8 bytes a number. One like train2017 (440 MB,
860,001 annotations) takes 1.2 GB at the most and 0.9 GB until the last tar is written.
"""

import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pipeline.corpus.members import Limits
from pipeline.corpus.text import UNPRINTABLE
from pipeline.ingest.masks import draw_segmentation
from pipeline.ingest.sample import IngestError, Listing, Phrase, Sample, make_key, read_image_file

PUBLISHED: Mapping[str, Mapping[str, int]] = {  # commonly known; images are those with annotations
    "train2014": {"images": 82_081, "annotations": 604_907},
    "val2014": {"images": 40_137, "annotations": 291_875},
    "train2017": {"images": 117_266, "annotations": 860_001},
    "val2017": {"images": 4_952, "annotations": 36_781},
    "lvis_v1_train": {"annotations": 1_270_141},
    "lvis_v1_val": {"annotations": 244_707},
}
_LISTS = {"images": ("id",), "annotations": ("image_id", "category_id"), "categories": ("id",)}
MAX_PIXELS = Limits().max_pixels
_MAX_NAME_BYTES = 255  # of most file systems
_REMARK = re.compile(r"_?\([^)]*\)")  # LVIS: orange_(fruit)


def list_coco(instances: Path, images: Path, *, lvis: bool = False) -> Listing:
    """List the images that ``instances`` has annotations of, by id.

    ``images``: the folder of their ``file_name``, or of LVIS the one with ``train2017`` and
    ``val2017``. ``lvis``: the file is LVIS's: ``coco_url`` names the images, and names lose their
    remark in brackets and their underscores.

    Raises:
        ValueError: ``instances`` is no such file, or ``images`` no folder.
        OSError: it cannot be read.
    """
    if not images.is_dir():
        raise ValueError(f"--images: expected a folder, got {images}")
    listed, annotations, categories = _read(instances)
    names = {item["id"]: _tidy_name(item, lvis=lvis) for item in categories}
    file_key = "coco_url" if lvis else "file_name"
    found = {item["id"]: _Image(item, images, file_key, names) for item in listed}
    num_ids = len(names) + len({image.key for image in found.values()})
    if num_ids < len(categories) + len(listed):
        raise ValueError(
            f"{instances}: expected ids of their own, got one of two images or classes"
        )
    left_out: Counter[str] = Counter()
    for annotation in annotations:
        image, category = found.get(annotation["image_id"]), annotation["category_id"]
        if image is None or category not in names:
            left_out["annotations of an image or a class that is not listed: left out"] += 1
        elif lvis and category in (image.about.get("not_exhaustive_category_ids") or ()):
            left_out["annotations of classes not exhaustively marked: left out"] += 1
        else:
            image.classes.setdefault(category, []).append(annotation)
            if not annotation.get("segmentation"):
                left_out["annotations without an outline: they add nothing"] += 1
    chosen = sorted((image for image in found.values() if image.classes), key=lambda one: one.key)
    if len(chosen) < len(found):
        left_out["images without annotation: left out"] = len(found) - len(chosen)
    split = re.sub(r"[^A-Za-z0-9_-]+", "-", instances.stem.removeprefix("instances_"))
    num_pairs = sum(len(image.classes) for image in chosen)
    return Listing(
        recipes=iter(chosen),
        split=split,
        published=PUBLISHED.get(split, {}),
        listed={"images": len(chosen), "pairs": num_pairs, "annotations": len(annotations)},
        notes=tuple(f"{number:,} {what}" for what, number in left_out.items()),
    )


@dataclass(slots=True, eq=False)
class _Image:
    """An image as the file describes it, with its annotations by class."""

    about: Mapping[str, Any]
    folder: Path
    file_key: str
    names: Mapping[int | str, str]
    classes: dict[int | str, list[Mapping[str, Any]]] = field(default_factory=dict)
    key: str = field(init=False)

    def __post_init__(self) -> None:
        """Make the key: 12 digits of a number."""
        name = self.about["id"]
        self.key = f"{name:012d}" if isinstance(name, int) else make_key(name, of=name)

    def build(self) -> Sample:
        """Read the image and draw the masks of its classes, in the order of the categories."""
        data = read_image_file(self._find_file())
        phrases, rejects = [], []
        for category, name in self.names.items():
            if category in self.classes:
                try:
                    mask = self._draw(self.classes[category])
                    phrases.append(Phrase(name, mask, {"category_id": category}))
                except IngestError as error:
                    rejects.append((name, error.reason, error.detail))
        return Sample(
            data, tuple(phrases), ids={"image_id": self.about["id"]}, rejects=tuple(rejects)
        )

    def _find_file(self) -> Path:
        name = str(self.about.get(self.file_key, "")).replace("\\", "/")
        if self.file_key == "coco_url":  # http://images.cocodataset.org/val2017/000000397133.jpg
            name = "/".join(name.split("/")[-2:])
        path = PurePosixPath(name)
        is_safe = path.name and not path.is_absolute() and ".." not in path.parts
        if not is_safe or UNPRINTABLE.search(name) or len(name.encode()) > _MAX_NAME_BYTES:
            detail = f"expected a file below the folder of images, got {name!r:.300}"
            raise IngestError("bad_path", f"{self.file_key}: {detail}")
        return self.folder / path

    def _draw(self, annotations: Iterable[Mapping[str, Any]]) -> np.ndarray:
        sides: list[Any] = [self.about.get(side) for side in ("height", "width")]
        are_sizes = all(type(side) is int and side > 0 for side in sides)
        if not are_sizes or math.prod(sides) > MAX_PIXELS:
            detail = f"expected height and width, {MAX_PIXELS} pixels at most, got {sides!r:.60}"
            raise IngestError("size", detail)
        height, width = sides
        mask = np.zeros((height, width), bool)
        for annotation in annotations:
            try:
                outline = annotation.get("segmentation")
                mask |= draw_segmentation(outline, height=height, width=width)
            except IngestError as error:
                detail = f"annotation {annotation.get('id')!r:.40}: {error.detail}"
                raise IngestError(error.reason, detail) from error
        return mask


def _read(file: Path) -> list[list[dict[str, Any]]]:
    """Return the images, annotations and categories, whose ids are numbers or texts."""
    try:
        document = json.loads(file.read_text(encoding="utf-8-sig"), object_hook=_pack)
    except (ValueError, RecursionError) as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: expected JSON, whole, got {got}") from error
    found = []
    for name, keys in _LISTS.items():
        items = document.get(name) if isinstance(document, dict) else None
        if not isinstance(items, list) or not items:
            raise ValueError(f"{file}: expected a list of {name}, got {items!r:.40}")
        for item in items:
            ids = [item.get(key) for key in keys] if isinstance(item, dict) else [None]
            if not all(type(one) in (int, str) for one in ids):
                expected = f"expected {' and '.join(keys)}, numbers or texts"
                raise ValueError(f"{file}: {name}: {expected}, got {item!r:.200}")
        found.append(items)
    return found


def _pack(item: dict[str, Any]) -> dict[str, Any]:
    """Keep of an annotation what is used, its polygons as 8 bytes a number, of 32 in a list."""
    if "category_id" not in item:
        return item
    outline = item.get("segmentation")
    if isinstance(outline, list):
        with suppress(TypeError, OverflowError):  # no numbers: refused when it is drawn
            outline = [array("d", polygon) for polygon in outline]
    kept = {key: item.get(key) for key in ("id", "image_id", "category_id")}
    return {**kept, "segmentation": outline}


def _tidy_name(category: Mapping[str, Any], *, lvis: bool) -> str:
    name = category.get("name")
    if not isinstance(name, str):
        return ""  # a phrase that the writer drops and counts
    return _REMARK.sub("", name).replace("_", " ") if lvis else name
