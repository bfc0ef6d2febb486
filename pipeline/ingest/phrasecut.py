"""PhraseCut: Visual Genome's images with phrases and outlines, as VGPhraseCut_v0 has them.

``refer_<split>.json`` lists tasks, each a phrase of an image with the polygons of its instances;
``image_data_split.json`` has the images' sizes; the images are ``images/<image_id>.jpg``. The list
of images names more than have phrases, so the tasks decide.

CLIPSeg's and LD-ZNet's loaders leave out the images whose size is not the annotations' (17, by a
list of ids; here by comparing) and the phrases whose boxes have no area. So does this one.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.base.json_list import iterate_items, read_json_text
from pipeline.base.raster import Rule, draw_polygons
from pipeline.base.yaml import SpecError
from pipeline.corpus.members import Limits
from pipeline.ingest.sample import IngestError, Listing, Phrase, Sample, read_image_file

Split = Literal["train", "val", "miniv", "test"]
PUBLISHED: dict[Split, dict[str, int]] = {
    "train": {"images": 71_746, "pairs": 310_816},
    "val": {"images": 2_871, "pairs": 19_495},
    "miniv": {"images": 100, "pairs": 821},
    "test": {"images": 2_545, "pairs": 14_354},
}
VAL_WITH_MINIV = {"images": 2_971, "pairs": 20_316}
_SIZES = ("image_data_split.json", "image_data_split3000.json")


@dataclass(frozen=True, slots=True, eq=False)
class PhraseCutImage:
    """An image with its tasks.

    ``size``: height and width that the annotations say, None where they do not; an image of another
    size is left out by the writer. ``spans``: the places of its tasks in ``text``, the whole file.
    """

    key: str
    path: Path
    size: tuple[int, int] | None
    rule: Rule
    text: str = field(repr=False)
    spans: tuple[tuple[int, int], ...]

    def build(self) -> Sample:
        """Read the image and draw a mask a phrase, in the file's order."""
        image = read_image_file(self.path)
        size = self.size
        if size is None or size[0] * size[1] > Limits().max_pixels:
            raise IngestError("size", f"{_SIZES[0]}: expected the image's size, got {size}")
        phrases: list[Phrase] = []
        rejects: list[tuple[str, str, str]] = []
        for start, end in self.spans:
            task = json.loads(self.text[start:end])
            try:
                phrases.append(_draw_phrase(task, size, self.rule))
            except (KeyError, TypeError, ValueError) as error:
                detail = f"expected phrase, task_id and Polygons of [x, y], got {error!r}"
                rejects.append((str(task.get("phrase")), "bad_annotation", detail))
        return Sample(
            image, tuple(phrases), ids={"image_id": int(self.key)}, rejects=tuple(rejects)
        )


def list_phrasecut(root: Path, *, split: Split, raster: Rule = "centre") -> Listing:
    """List one split: a recipe an image, by image id, with its phrases in the file's order.

    Takes as much memory as the file is long (340 MB for train), and twice that while it is read.

    Args:
        root: The folder VGPhraseCut_v0.
        split: Which ``refer_<split>.json``.
        raster: "centre" draws as CLIPSeg and LD-ZNet do, "official" as PhraseCut's evaluator.

    Raises:
        SpecError: a file is not there, or is not what its name says.
    """
    path = root / f"refer_{split}.json"
    if not path.is_file() or not (root / "images").is_dir():
        raise SpecError(
            f"{root}: expected {path.name}, {_SIZES[0]} and images/<image_id>.jpg, as in "
            "VGPhraseCut_v0; a link to the folder of Visual Genome's images serves as images"
        )
    sizes = _read_sizes(root)
    text = read_json_text(path)
    spans: dict[int, list[tuple[int, int]]] = {}
    num_pairs = num_flat = 0
    for start, end, task in iterate_items(text, where=str(path)):
        of_image = spans.setdefault(_get_image_id(task, f"{path}: task {num_pairs}"), [])
        num_pairs += 1
        if _has_area(task):
            of_image.append((start, end))
        else:
            num_flat += 1
    counts = {"images": len(spans), "pairs": num_pairs}
    kept = {number: places for number, places in sorted(spans.items()) if places}
    return Listing(
        _list_recipes(root / "images", text, kept, sizes, raster),
        split,
        VAL_WITH_MINIV if split == "val" and counts == VAL_WITH_MINIV else PUBLISHED[split],
        counts,
        tuple(_list_notes(split, counts, num_flat, len(spans) - len(kept))),
    )


def _list_recipes(
    folder: Path,
    text: str,
    spans: Mapping[int, list[tuple[int, int]]],
    sizes: Mapping[int, tuple[int, int]],
    rule: Rule,
) -> Iterator[PhraseCutImage]:
    for number, places in spans.items():
        path = folder / f"{number}.jpg"
        yield PhraseCutImage(str(number), path, sizes.get(number), rule, text, tuple(places))


def _list_notes(
    split: Split, counts: Mapping[str, int], num_flat: int, num_empty: int
) -> Iterator[str]:
    if split == "val":
        has = "with" if counts == VAL_WITH_MINIV else "without"
        yield (
            f"val {has} miniv: it is published as 2,871 images / 19,495 pairs without the 100 "
            "images of miniv, a split of its own, and as 2,971 / 20,316 with them"
        )
    if num_flat:
        yield (
            f"{num_flat:,} pairs whose boxes have no area are left out, as CLIPSeg's and LD-ZNet's "
            f"loaders do, and with them {num_empty:,} images that have no other"
        )


def _read_sizes(root: Path) -> dict[int, tuple[int, int]]:
    """Return image id → height and width as the annotations have them."""
    path = next((root / name for name in _SIZES if (root / name).is_file()), root / _SIZES[0])
    sizes = {}
    for _, _, image in iterate_items(read_json_text(path), where=str(path)):
        number = _get_image_id(image, str(path))
        try:
            sizes[number] = (int(image["height"]), int(image["width"]))
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(f"{path}: image {number}: no height and width: {error!r}") from error
    return sizes


def _get_image_id(item: Any, where: str) -> int:
    try:
        return int(str(item["image_id"]))
    except (KeyError, TypeError, ValueError) as error:
        raise SpecError(f"{where}: expected a whole number as image_id, got {error!r}") from error


def _has_area(task: Mapping[str, Any]) -> bool:
    """Whether the task's boxes (x, y, w, h) have an area; without boxes its polygons decide."""
    try:
        return sum(width * height for _, _, width, height in task["instance_boxes"]) > 0
    except (KeyError, TypeError, ValueError):
        return True


def _draw_phrase(task: Mapping[str, Any], size: tuple[int, int], rule: Rule) -> Phrase:
    text, task_id = task["phrase"], task["task_id"]
    if not isinstance(text, str) or not isinstance(task_id, str | int):
        raise TypeError(f"{text!r:.40} as phrase and {task_id!r:.40} as task_id")
    polygons = [polygon for instance in task["Polygons"] for polygon in instance]
    return Phrase(text, draw_polygons(polygons, size, rule), {"task_id": task_id})
