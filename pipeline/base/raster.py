"""Polygons to masks, by the two rules that the field uses.

- ``centre``: a pixel is set if its centre, at whole numbers, is inside the polygon by the even-odd
  rule, on an edge or a vertex. That is skimage's ``polygon2mask`` pixel by pixel, which CLIPSeg and
  LD-ZNet draw PhraseCut with (O'Rourke, Computational Geometry in C, second edition, 7.4).
- ``official``: PhraseCut's evaluator: Pillow fills the polygon of the coordinates cut to integers,
  its outline included. Of one point there is nothing to draw.

They differ by about half a pixel along the boundary: much of a small object.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Rule = Literal["centre", "official"]
MAX_COORDINATE = 1e6  # px: far outside of any image, and exact to 1e-10 in float64
_VERTEX_PX = 1e-12  # a vertex so near a pixel's centre is on it, as in skimage
_CROSSINGS_AT_ONCE = 2**20  # of edges and rows: 100 MB whatever the polygon


def draw_polygons(
    polygons: Iterable[Sequence[Sequence[float]]], size: tuple[int, int], rule: Rule = "centre"
) -> np.ndarray:
    """Return the union of polygons as a mask (H, W) bool.

    Args:
        polygons: Each a list of [x, y] in pixels; x to the right, y down. They may reach out of the
            image, cross themselves and be degenerate; one without points draws nothing.
        size: Height and width.
        rule: One of the two above.

    Raises:
        ValueError: a polygon is no list of two finite numbers each, within ``MAX_COORDINATE``.
    """
    mask_HW = np.zeros(size, bool)
    canvas = Image.new("L", size[::-1]) if rule == "official" else None
    for polygon in polygons:
        points_N2 = _check(polygon)
        if canvas is not None and len(points_N2) > 1:
            ImageDraw.Draw(canvas).polygon([(int(x), int(y)) for x, y in points_N2], 1, 1)
        elif canvas is None and len(points_N2):
            _fill_centres(mask_HW, points_N2[:, 0], points_N2[:, 1])
    return mask_HW if canvas is None else np.asarray(canvas) > 0


def _check(polygon: Sequence[Sequence[float]]) -> np.ndarray:
    """Return a polygon as (N, 2) float64."""
    try:
        points_N2 = np.array(polygon, np.float64).reshape(len(polygon), 2)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"polygon: expected a list of [x, y], got {polygon!r:.80}") from error
    if not (np.abs(points_N2) <= MAX_COORDINATE).all():  # NaN is not either
        raise ValueError(
            f"polygon: expected finite coordinates within {MAX_COORDINATE:g} px, got "
            f"{points_N2[~(np.abs(points_N2) <= MAX_COORDINATE)][0]}"
        )
    return points_N2


def _fill_centres(mask_HW: np.ndarray, x_N: np.ndarray, y_N: np.ndarray) -> None:
    """Set the pixels of a polygon.

    A row's line crosses edges; a pixel with an odd number of crossings to its right, or to its
    left, is inside or on an edge. Both are asked, and a vertex on the line counts for the side
    below in one and for the side above in the other, so that edges and vertices are inside.
    """
    height, width = mask_HW.shape
    top, bottom = np.clip([np.ceil(y_N.min()), np.floor(y_N.max()) + 1], 0, height).astype(int)
    begin, end = np.clip([np.floor(x_N.min()), np.ceil(x_N.max()) + 1], 0, width).astype(int)
    # Where the parity changes along a row: of the crossings to a pixel's right (a polygon is closed
    # and crosses a row an even number of times), and of those to its left.
    right, left = np.zeros((2, bottom - top, end - begin + 1), np.uint8)
    for row, edge in _list_crossings(y_N, top, bottom):
        x0, x1 = x_N[edge], x_N[edge - 1]
        y0, y1 = y_N[edge] - row, y_N[edge - 1] - row
        over, under = (y0 > 0) != (y1 > 0), (y0 < 0) != (y1 < 0)
        for changes, some, sign in ((right, over, 1), (left, under, -1)):
            first = _find_first(x0[some], y0[some], x1[some], y1[some], sign)
            np.add.at(changes, (row[some] - top, np.clip(first - begin, 0, end - begin)), 1)
    odd = (right.cumsum(axis=1, dtype=np.uint8) | left.cumsum(axis=1, dtype=np.uint8)) & 1
    mask_HW[top:bottom, begin:end] |= odd[:, :-1].astype(bool)
    near_x, near_y = np.rint(x_N), np.rint(y_N)
    on = (np.abs(x_N - near_x) < _VERTEX_PX) & (np.abs(y_N - near_y) < _VERTEX_PX)
    on &= (near_x >= 0) & (near_x < width) & (near_y >= 0) & (near_y < height)
    mask_HW[near_y[on].astype(int), near_x[on].astype(int)] = True


def _list_crossings(
    y_N: np.ndarray, top: int, bottom: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows in [top, bottom) and the edges (from the point before to this) that reach each."""
    before_N = np.roll(y_N, 1)
    first_N = np.clip(np.ceil(np.minimum(y_N, before_N)), top, bottom).astype(int)
    end_N = np.clip(np.floor(np.maximum(y_N, before_N)) + 1, top, bottom).astype(int)
    step = max(1, _CROSSINGS_AT_ONCE // max(1, bottom - top))
    for start in range(0, len(y_N), step):
        first, count = first_N[start : start + step], (end_N - first_N)[start : start + step]
        edge = np.repeat(np.arange(len(count)), count)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
        yield row, edge + start


def _find_first(
    x0: np.ndarray, y0: np.ndarray, x1: np.ndarray, y1: np.ndarray, sign: int
) -> np.ndarray:
    """Return the first pixel that a crossing is not right of (sign 1), or is left of (-1).

    Where the crossing is almost at a pixel's centre, rounding decides; so the three pixels around
    it are asked by skimage's own expression, and the others follow from the order along the row.
    """
    middle = np.rint((x0 * y1 - x1 * y0) / (y1 - y0)).astype(int)
    first = middle - 1
    for pixel in (middle - 1, middle, middle + 1):
        at = ((x0 - pixel) * y1 - (x1 - pixel) * y0) / (y1 - y0)
        first += at > 0 if sign > 0 else ~(at < 0)
    return first
