"""Writes coco_masks.json anew: outlines of every sort, and the masks that pycocotools gives them.

pip install pycocotools==2.0.11 && python tests/pipeline/ingest/write_coco_masks.py
"""

import json
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

FILE = Path(__file__).with_name("coco_masks.json")


def draw_outlines(rng):
    for scale, digits in ((1.0, 2), (1.0, 0), (9.0, 2), (0.2, 3)):
        for num_points in (3, 4, 5, 9, 30):
            height, width = (int(n) for n in rng.integers(1, 70, 2))
            points = rng.uniform(-0.1, 1.1, (num_points, 2)) * (scale * width, scale * height)
            points = points.round(digits)
            if num_points > 4:
                points[2] = points[1]  # an edge without length
            yield height, width, [points.ravel().tolist()]
    inside = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]
    yield 50, 40, [inside, [number + 5 for number in inside]]  # overlap
    yield 50, 40, [inside, [number * 3 for number in inside], [2.5, 2.5, 8.5, 2.5, 4.5, 7.5]]
    yield 20, 30, [[4.0, 2.0, 4.0, 9.0, 4.0, 15.0]]  # no width
    yield 20, 30, [[-9.0, -9.0, 90.0, -9.0, 90.0, 90.0, -9.0, 90.0]]  # all of the image
    yield 20, 30, [[-9.0, -9.0, -4.0, -9.0, -4.0, -4.0]]  # none of it


def write():
    cases = []
    for height, width, polygons in draw_outlines(np.random.default_rng(0)):
        code = coco.merge(coco.frPyObjects(polygons, height, width))
        counts = code["counts"].decode()
        cases.append({"size": [height, width], "polygons": polygons, "counts": counts})
    lines = ",\n".join(json.dumps(case) for case in cases)
    FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    write()
