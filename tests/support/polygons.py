"""Polygons drawn by a slow rule of their own, in exact arithmetic."""

from fractions import Fraction

import numpy as np


def is_inside(x, y, polygon):
    """Whether a pixel's centre is in a polygon, by the even-odd rule to both sides."""
    if [x, y] in polygon:
        return True
    to_right = to_left = 0
    for (x0, y0), (x1, y1) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        for before in (False, True):  # which side of the line a vertex on it belongs to
            a, b = (y0 >= y, y1 >= y) if before else (y0 > y, y1 > y)
            if a != b:
                at = x0 + (Fraction(y) - y0) * (Fraction(x1) - x0) / (Fraction(y1) - y0)
                to_left += before and at < x
                to_right += not before and at > x
    return bool(to_left % 2 or to_right % 2)


def draw_slowly(polygons, size):
    """Return the union's mask (H, W) bool."""
    height, width = size
    rows = [
        [any(p and is_inside(x, y, p) for p in polygons) for x in range(width)]
        for y in range(height)
    ]
    return np.array(rows, bool).reshape(size)
