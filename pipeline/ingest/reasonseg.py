"""ReasonSeg: X.jpg with X.json, whose texts ask for the same region of the image in several words.

Source of its rules: the reader that its authors publish (LISA), which draws by OpenCV.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.base.raster import draw_polygons
from pipeline.decode.images import turn_upright
from pipeline.ingest.sample import IngestError, Listing, Phrase, Sample, make_key, read_image_file
from pipeline.ingest.writer import read_image_header

PUBLISHED_IMAGES = {"train": 239, "val": 200, "test": 779}
MAX_OUTLINE_PX = 2**22  # of a shape
_BACK = {6: 8, 8: 6}  # EXIF's turns that another one undoes; each other undoes itself


@dataclass(frozen=True, slots=True)
class ReasonImage:
    """One image and its JSON, ``PATH.jpg`` and ``PATH.json``."""

    key: str
    path: str

    def build(self) -> Sample:
        """Read both and draw the regions: all texts share one mask."""
        image = read_image_file(Path(f"{self.path}.jpg"))
        found = _load_annotation(Path(f"{self.path}.json"))
        header = read_image_header(image)
        # OpenCV turns an image upright as it reads it, and that is where the points are.
        size = header.size[::-1] if header.turn > 4 else header.size
        try:
            texts = found["text"] if isinstance(found["text"], list) else [found["text"]]
            if odd := [text for text in texts if not isinstance(text, str)]:
                raise TypeError(f"a text that is {odd[0]!r:.40}")
            ids: dict[str, str | int] = {
                "name": Path(self.path).name,
                "is_sentence": int(bool(found["is_sentence"])),
            }
            target, ignore = draw_shapes(found["shapes"], size)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            detail = f"expected text, is_sentence and shapes of label and points, got {error!r}"
            raise IngestError("bad_annotation", detail) from error
        back = _BACK.get(header.turn, header.turn)
        mask = turn_upright(target, back)
        phrases = tuple(Phrase(text, mask, {"text_id": i}) for i, text in enumerate(texts))
        return Sample(image, phrases, ignore=turn_upright(ignore, back), ids=ids)


def list_reasonseg(root: Path, *, split: str) -> Listing:
    """List the images of ``ROOT/SPLIT`` that have a JSON file, by name.

    Raises:
        ValueError: there is none.
        OSError: the folder cannot be read.
    """
    folder = root / split
    paths = sorted(path.with_suffix("") for path in folder.iterdir() if path.suffix == ".json")
    if not paths:
        raise ValueError(f"{folder}: expected X.jpg and X.json, got no JSON file")
    published = {"images": PUBLISHED_IMAGES[split]} if split in PUBLISHED_IMAGES else {}
    recipes = (ReasonImage(make_key(path.name, of=path.name), str(path)) for path in paths)
    return Listing(recipes, split, published, {"images": len(paths)})


def _load_annotation(path: Path) -> Any:
    """Read an image's JSON, in UTF-8 or else in Windows's 1252."""
    data = path.read_bytes()
    try:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("cp1252")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        detail = f"{path.name} is no JSON: {type(error).__name__}: {error}"
        raise IngestError("bad_annotation", detail) from error


def draw_shapes(
    shapes: Sequence[Mapping[str, Any]], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the target and what is ignored, both (H, W) bool.

    Shapes are drawn one over the other by descending area, and of equal ones the earlier last: so
    an ignored region may be inside a target, and a target inside that.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError: a shape of another form.
    """
    target, ignore = np.zeros(size, bool), np.zeros(size, bool)
    used = [shape for shape in reversed(shapes) if shape["label"].lower() != "flag"]
    for shape in sorted(used, key=lambda s: -int(draw_shape(s["points"], size).sum())):
        mask, is_ignored = draw_shape(shape["points"], size), "ignore" in shape["label"].lower()
        target[mask], ignore[mask] = not is_ignored, is_ignored
    return target, ignore


def draw_shape(points: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """Return a polygon's mask (H, W) as OpenCV's ``fillPoly`` and ``polylines`` draw it.

    The points are cut to integers, and the outline, by Bresenham's rule, belongs to it. Equal pixel
    by pixel where all points are in the image; of an edge that leaves it, OpenCV cuts the end off
    first, which may move the rest by a pixel.

    Raises:
        TypeError, ValueError: the points are no list of [x, y], or too far apart.
    """
    corners = np.trunc(np.array(points, np.float64).reshape(len(points), 2))
    mask = draw_polygons([corners.tolist()], size, "centre")
    edges = np.stack([corners, np.roll(corners, -1, axis=0)], axis=1).astype(np.int64)
    if np.abs(edges[:, 1] - edges[:, 0]).max(axis=1, initial=0).sum() > MAX_OUTLINE_PX:
        raise ValueError(f"an outline of more than {MAX_OUTLINE_PX} px")
    for ends in edges:
        start, end = ends[np.argsort(ends[:, 0], kind="stable")]  # from left to right
        num_steps = max(1, int(np.abs(end - start).max()))
        part = np.abs(end - start) * np.arange(num_steps + 1)[:, None] / num_steps
        pixels = start + np.sign(end - start) * np.ceil(part - 0.5).astype(np.int64)
        x, y = pixels[((pixels >= 0) & (pixels < size[::-1])).all(axis=1)].T
        mask[y, x] = True
    return mask
