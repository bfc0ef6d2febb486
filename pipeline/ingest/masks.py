"""COCO's outlines -> (H, W) bool: polygons by its own raster, and run lengths, each checked first.

pycocotools is not used: its rule is forty lines of NumPy, and it reads a first polygon of four
numbers as boxes, believes a run-length code's size before the image's, and shows unset memory where
the runs end early. Source of both rules: cocoapi, ``common/maskApi.c``.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.ingest.sample import IngestError

MAX_COORDINATE_PX = 1e6
MAX_OUTLINE_STEPS = 1 << 23
"""Longest outline of a polygon, in fifths of a pixel: 0.6 GB while it is drawn."""
_FINER = 5  # the outline is walked in a grid this much finer than the pixels


def draw_segmentation(segmentation: object, *, height: int, width: int) -> np.ndarray:
    """Return the mask (H, W) of a COCO annotation's ``segmentation``: polygons, or run lengths.

    An empty list, and None, give an empty mask: COCO has such annotations.

    Raises:
        IngestError: "bad_polygon", "bad_rle", or "size" for run lengths of another size.
    """
    if isinstance(segmentation, Mapping):
        return decode_rle(segmentation, height=height, width=width)
    if segmentation is None:
        segmentation = []
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str | bytes):
        got = type(segmentation).__name__
        raise IngestError("bad_polygon", f"expected a list of polygons, or run lengths, got {got}")
    mask = np.zeros((height, width), bool)
    for polygon in segmentation:
        mask |= draw_polygon(polygon, height=height, width=width)
    return mask


def draw_polygon(polygon: object, *, height: int, width: int) -> np.ndarray:
    """Return the mask (H, W) of one polygon ``[x, y, x, y, ...]`` in px, by COCO's raster.

    The outline is walked in a grid five times finer. Where it crosses the middle of a column of
    pixels, inside and outside change below the crossing.

    Raises:
        IngestError: "bad_polygon".
    """
    points = np.trunc(_FINER * _check_polygon(polygon) + 0.5)
    x, y = _walk_outline(points)
    moved = x[1:] != x[:-1]
    left = np.minimum(x[1:], x[:-1])[moved]
    column = (left + 0.5) / _FINER - 0.5
    row = np.ceil(((np.minimum(y[1:], y[:-1])[moved] + 0.5) / _FINER - 0.5).clip(0, height))
    in_middle = (column == np.floor(column)) & (column >= 0) & (column <= width - 1)
    changes = np.sort((column * height + row)[in_middle]).astype(np.int64)
    runs = np.diff(changes, prepend=0, append=height * width)
    return _fill_runs(runs, height=height, width=width)


def decode_rle(code: Mapping[str, object], *, height: int, width: int) -> np.ndarray:
    """Return the mask (H, W) of run lengths ``{"size": [h, w], "counts": ...}``.

    The runs go down the columns, the first of background. ``counts`` is a list of lengths, or
    COCO's string of them.

    Raises:
        IngestError: "size" if it is of another image, "bad_rle" if its runs do not fill it.
    """
    size, counts = code.get("size"), code.get("counts")
    if size != [height, width]:
        got = repr(size)[:60]
        raise IngestError("size", f"run lengths: expected size [{height}, {width}], got {got}")
    if isinstance(counts, str | bytes):
        counts = decode_counts(counts)
    if not isinstance(counts, list) or not all(type(run) is int and run >= 0 for run in counts):
        raise IngestError("bad_rle", f"counts: expected lengths, got {repr(counts)[:60]}")
    if sum(counts) != height * width:
        detail = f"expected {height * width} pixels, got runs of {sum(counts)} in all"
        raise IngestError("bad_rle", detail)
    return _fill_runs(np.array(counts, np.int64), height=height, width=width)


def decode_counts(text: str | bytes) -> list[int]:
    """Return the run lengths in COCO's string, which may be negative where it is damaged.

    A number is written in pieces of five bits, the lowest first, each as a character from ``0``
    (48) on: bit 6 says that more follow, bit 5 of the last is the sign. From the fourth number on,
    what is written is the difference to the last but one.

    Raises:
        IngestError: "bad_rle".
    """
    data = text.encode() if isinstance(text, str) else text
    counts: list[int] = []
    value = shift = 0
    for at, character in enumerate(data):
        piece = character - 48
        if not 0 <= piece < 64 or shift > 30:
            raise IngestError("bad_rle", f"counts: byte {at} is {character}, which is no such code")
        value |= (piece & 31) << shift
        shift += 5
        if not piece & 32:
            value -= (piece & 16) and 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    if shift:
        raise IngestError("bad_rle", "counts: the text ends inside a number")
    return counts


def _check_polygon(polygon: object) -> np.ndarray:
    """Return a polygon's points (N, 2) in float64."""
    try:
        numbers = np.asarray(polygon)
    except ValueError:  # lists of unlike lengths
        numbers = np.asarray(None)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf":
        detail = f"expected a list of numbers, got {repr(polygon)[:60]}"
        raise IngestError("bad_polygon", detail)
    if len(numbers) < 6 or len(numbers) % 2:
        detail = f"expected x and y of 3 points or more, got {len(numbers)} numbers"
        raise IngestError("bad_polygon", detail)
    points = numbers.astype(np.float64).reshape(-1, 2)
    if not (np.abs(points) <= MAX_COORDINATE_PX).all():  # false for nan
        detail = f"expected finite points within {MAX_COORDINATE_PX:.0f} px, got {points.tolist()}"
        raise IngestError("bad_polygon", detail[:200])
    return points


def _walk_outline(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of each step around a closed outline, edge by edge with both its ends.

    An edge is walked along its longer direction, from the smaller end as far as rounding goes.
    """
    ends = np.roll(points, -1, axis=0)
    num_steps_xy = np.abs(ends - points)
    steep = num_steps_xy[:, 0] < num_steps_xy[:, 1]
    num_steps = num_steps_xy.max(axis=1).astype(np.int64)
    if (total := int(num_steps.sum())) > MAX_OUTLINE_STEPS:
        detail = f"expected an outline of at most {MAX_OUTLINE_STEPS // _FINER} px"
        raise IngestError("bad_polygon", f"{detail}, got {total // _FINER}")
    along = np.where(steep[:, None], points[:, ::-1], points)  # the longer direction first
    along_end = np.where(steep[:, None], ends[:, ::-1], ends)
    back = along[:, 0] > along_end[:, 0]
    first = np.where(back[:, None], along_end, along)
    last = np.where(back[:, None], along, along_end)
    slope = (last - first)[:, 1] / np.maximum(num_steps, 1)

    edge = np.repeat(np.arange(len(points)), num_steps + 1)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(num_steps + 1) - num_steps - 1, num_steps + 1)
    step = np.where(back[edge], num_steps[edge] - step, step)
    longer = first[edge, 0] + step
    shorter = np.trunc(first[edge, 1] + slope[edge] * step + 0.5)
    return np.where(steep[edge], shorter, longer), np.where(steep[edge], longer, shorter)


def _fill_runs(runs: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Return (H, W) bool of run lengths down the columns, every second run being set."""
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T
