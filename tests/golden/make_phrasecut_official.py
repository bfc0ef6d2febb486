"""Golden figures from PhraseCut's official evaluator, on predictions that a formula makes.

    PYTHONPATH=. python tests/golden/make_phrasecut_official.py CHECKOUT

CHECKOUT is a clone of https://github.com/ChenyunWu/PhraseCutDataset (commit 276470b), whose code
needs matplotlib; a split of its own is written to its folder of data. The predictions are ours at
the images' size, as boolean masks. The figures that it tells stand in
tests/pipeline/evaluate/test_phrasecut.py, which takes ``list_tasks``, ``make_index`` and
``predict_views`` from here.
"""

import json
import random
import sys
from math import cos, sin
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

VIEW_PX = 48
# Image id, stored width and height, EXIF's orientation, and the view's box once upright.
IMAGES = (
    (1, (90, 60), 1, (0, 0, 90, 60)),
    (2, (60, 90), 1, (0, 15, 60, 75)),
    (3, (40, 30), 1, (0, 0, 40, 30)),
    (4, (80, 50), 6, (0, 0, 50, 80)),
)
THRESHOLDS = (0.3, 0.5)
LEFT_OUT = ("2__1",)  # a task without a pair


def list_tasks():
    """Three tasks an image: jagged outlines around a point, some of them outside, some tiny."""
    rng = random.Random(0)

    def outline(width, height):
        x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.choice([2, 8, 20, 30])
        turns = [i * 2 * 3.14159 / 17 for i in range(17)]
        radii = [radius * rng.uniform(0.5, 1.2) for _ in turns]
        return [
            [round(x + r * cos(t), 2), round(y + r * sin(t), 2)]
            for r, t in zip(radii, turns, strict=True)
        ]

    return [
        {
            "task_id": f"{image}__{number}",
            "image_id": image,
            "phrase": "thing",
            "phrase_structure": {"name": "thing", "attributes": [], "relation_descriptions": []},
            "instance_boxes": [[1, 1, 9, 9]] * (number + 1),
            "Polygons": [[outline(*size) for _ in range(2)] for _ in range(number + 1)],
        }
        for image, size, _, _ in IMAGES
        for number in range(3)
    ]


def make_index():
    """The columns of index.parquet that the figures need, a row a task but those left out."""
    rows = []
    for image, (width, height), turn, box in IMAGES:
        upright = (height, width) if turn > 4 else (width, height)
        for number in range(3):
            rows.append(
                {
                    "task_id": f"{image}__{number}",
                    "source_width": upright[0],
                    "source_height": upright[1],
                    "orientation": turn,
                    **dict(
                        zip(("box_left", "box_top", "box_right", "box_bottom"), box, strict=True)
                    ),
                }
            )
    return pa.Table.from_pylist([row for row in rows if row["task_id"] not in LEFT_OUT])


def predict_views(truths):
    """Probabilities (B, VIEW_PX, VIEW_PX): a truth's upright mask, shrunk, and waves over it."""
    waves = np.add.outer(np.sin(np.arange(VIEW_PX) / 3), np.cos(np.arange(VIEW_PX) / 5)) / 4
    views = []
    for truth in truths:
        rows = np.arange(VIEW_PX) * truth.shape[0] // VIEW_PX
        columns = np.arange(VIEW_PX) * truth.shape[1] // VIEW_PX
        views.append(np.clip(0.6 * truth[np.ix_(rows, columns)] + 0.2 + waves, 0, 1))
    return torch.from_numpy(np.stack(views)).float()


def main(checkout):
    """Print the official figures at each threshold."""
    from pipeline.base.orientation import turn_upright
    from pipeline.evaluate.phrasecut import Annotations, NativeMasks, place_view
    from pipeline.spec.fields import LatentsSpec

    data = checkout / "data" / "VGPhraseCut_v0"
    data.mkdir(parents=True, exist_ok=True)
    (data / "refer_miniv.json").write_text(json.dumps(list_tasks()))
    (data / "image_data_split.json").write_text(
        json.dumps(
            [
                {"image_id": i, "width": w, "height": h, "split": "miniv"}
                for i, (w, h), _, _ in IMAGES
            ]
        )
    )
    counts = {"cat": [], "att": [], "rel": []}  # of the subsets, which are not asked for
    (data / "name_att_rel_count.json").write_text(json.dumps(counts))
    sys.path.insert(0, str(checkout / "utils"))
    from evaluator import Evaluator

    index = make_index().to_pylist()
    spec = LatentsSpec(model="m", crop="resize", keep_json=("task_id",))
    native = NativeMasks(Annotations.read(data / "refer_miniv.json"), spec, make_index().select)
    truths = native.draw(range(len(index)))
    views = predict_views([truth.numpy() for truth in truths])
    back = {1: 1, 6: 8}  # the turn that undoes it: the evaluator knows no EXIF
    for threshold in THRESHOLDS:
        evaluator = Evaluator(refvg_split="miniv", analyze_subset=False)
        for image, _, turn, box in IMAGES:
            predicted = {}
            for row, truth, view in zip(index, truths, views, strict=True):
                if row["task_id"].startswith(f"{image}__"):
                    mask = (place_view(view, box, truth.shape) > threshold).numpy()
                    predicted[row["task_id"]] = {"pred_mask": turn_upright(mask, back[turn])}
            evaluator.eval_single_img(image, predicted)
        found = evaluator.analyze_stats(mask_box=["mask"])["all"]
        share = evaluator.evaluated_task_count / evaluator.refvg_loader.task_num
        figures = threshold, found["mean_mask_iou"] * share, found["cum_mask_iou"]
        sys.stderr.write(f"{figures}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
