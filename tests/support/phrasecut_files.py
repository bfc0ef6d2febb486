"""Small PhraseCut data in the files of the original, written by code of its own.

The images 11 to 17 have what the real ones have: several instances and polygons, outlines that
reach out of the image, EXIF's turn, another size than the annotations', a file that is missing,
boxes without area, phrases without a polygon or with a damaged one. 18 is listed without tasks.
"""

import json

import numpy as np
from PIL import Image

SIZES = {11: (40, 30), 12: (32, 24), 13: (36, 28), 14: (20, 20), 15: (24, 30), 16: (33, 27)}
SIZES |= {17: (26, 22), 18: (10, 10)}  # width and height as annotated
FILE_SIZES = SIZES | {13: (28, 36)}
EXIF = {12: 6, 17: 3}
SQUARE = [[4, 4], [12, 4], [12, 10], [4, 10]]
TRIANGLE = [[14.5, 3.25], [23.75, 9], [15, 17.5]]
OUTSIDE = [[-5.5, 12], [9, 14.25], [6.5, 40]]
BOX = [3.0, 3.0, 9.5, 7.0]


def list_tasks():
    """The tasks as refer_<split>.json has them; those of an image do not stand together."""

    def task(image, number, phrase, instances, boxes=None):
        return {
            "task_id": f"{image}__{number}",
            "image_id": image,
            "ann_ids": [number],
            "instance_boxes": [BOX] * len(instances) if boxes is None else boxes,
            "Polygons": instances,
            "phrase": phrase,
            "phrase_structure": {"name": phrase.split()[-1], "attributes": [], "type": "name"},
        }

    return [
        task(16, 1, "grey cat", [[SQUARE]]),
        task(11, 2, "wooden chairs", [[SQUARE, TRIANGLE], [OUTSIDE]]),
        task(11, 1, "man in a hat", [[TRIANGLE]]),
        task(12, 5, "red car", [[TRIANGLE], [SQUARE]]),
        task(13, 1, "tall tree", [[SQUARE]]),
        task(14, 1, "lost dog", [[SQUARE]]),
        task(15, 1, "flat sea", [[SQUARE]], boxes=[[3, 3, 0, 7]]),
        task(15, 2, "thin sky", [[TRIANGLE]], boxes=[[3, 3, 7, 0], [1, 1, 0, 0]]),
        task(16, 2, "no outline", [[]]),
        task(16, 3, "broken outline", [[[[1, 1], [float("nan"), 5], [2, 9]]]]),
        task(16, 4, "half a table", [[TRIANGLE]]),
        task(16, 5, "without boxes", [[SQUARE]], boxes=[]),
        task(17, 1, "upside down", [[SQUARE, OUTSIDE]]),
    ]


def write_phrasecut(root, split="test", sizes_name="image_data_split.json"):
    """Write one split below ``root`` and return its tasks."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for image, (width, height) in FILE_SIZES.items():
        if image == 14:
            continue
        shape = (height, width) if image == 16 else (height, width, 3)
        picture = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        exif = Image.Exif()
        exif[0x0112] = EXIF.get(image, 1)
        picture.save(root / "images" / f"{image}.jpg", quality=90, exif=exif)
    listed = [
        {"image_id": i, "width": w, "height": h, "split": split, "url": "", "coco_id": None}
        for i, (w, h) in sorted(SIZES.items(), reverse=True)
    ]
    (root / sizes_name).write_text(json.dumps(listed))
    tasks = list_tasks()
    (root / f"refer_{split}.json").write_text(json.dumps(tasks))
    return tasks
