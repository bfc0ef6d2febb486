"""Writes opencv_shapes.json anew: shapes, and the masks that OpenCV gives them, as rows of bits.

pip install opencv-python-headless==5.0.0.93 && python tests/pipeline/ingest/write_opencv_shapes.py
"""

import json
from pathlib import Path

import cv2
import numpy as np

SIZE = (40, 56)


def list_shapes():
    random = np.random.default_rng(0)
    height, width = SIZE
    yield [[5.9, 3.9]]
    yield [[3, 3], [20.5, 9.5]]
    yield [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
    for number in range(1, 60):
        scale = np.array([width, height]) - 1e-3
        points = random.random((random.integers(1, 12), 2)) * scale
        if number % 2:  # star-shaped
            angle = np.sort(random.random(len(points)) * 2 * np.pi)
            radius = random.random((len(points), 1)) * 18
            points = scale / 2 + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        yield points.round(2).tolist()


def draw(points):
    mask = np.zeros(SIZE, np.uint8)
    corners = np.array([points], np.int32)
    cv2.polylines(mask, corners, isClosed=True, color=1, thickness=1)
    cv2.fillPoly(mask, corners, 1)
    return np.packbits(mask).tobytes().hex()


if __name__ == "__main__":
    lines = [json.dumps({"points": points, "mask": draw(points)}) for points in list_shapes()]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    Path(__file__).with_name("opencv_shapes.json").write_text(text, encoding="ascii")
