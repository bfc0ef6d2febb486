"""Writes small data as RefCOCO, gRefCOCO and ReasonSeg publish theirs, with the masks they mean.

By code of its own: of boxes, whose pixels are a slice, so that no rasteriser has to be believed.
"""

import io
import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 40, 60


def encode_jpeg(seed, size=(HEIGHT, WIDTH), orientation=None):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize(size[::-1])
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def polygon(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def fill(*boxes, size=(HEIGHT, WIDTH)):
    mask = np.zeros(size, bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


def run_lengths(mask):
    """COCO's uncompressed ones, down the columns, the first of background."""
    counts, last = [0], False
    for pixel in mask.T.reshape(-1).tolist():
        if pixel != last:
            counts.append(0)
        counts[-1] += 1
        last = pixel
    return {"size": list(mask.shape), "counts": counts}


def sentence(sent_id, sent, raw=None):
    return {"sent_id": sent_id, "sent": sent, "raw": raw or sent, "tokens": sent.split()}


def ref(ref_id, image_id, ann_id, split, *sentences):
    return {
        "ref_id": ref_id,
        "image_id": image_id,
        "ann_id": ann_id,
        "split": split,
        "file_name": f"COCO_train2014_{image_id:012d}_{ref_id}.jpg",  # no file has this name
        "category_id": 1,
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": list(sentences),
    }


def outline(ann_id, image_id, segmentation, *, crowd=0):
    return {
        "id": ann_id,
        "image_id": image_id,
        "segmentation": segmentation,
        "iscrowd": crowd,
        "category_id": 1,
        "bbox": [0.0, 0.0, 1.0, 1.0],
    }


def image_entry(image_id, size=(HEIGHT, WIDTH)):
    name = f"COCO_train2014_{image_id:012d}.jpg"
    return {"id": image_id, "file_name": name, "height": size[0], "width": size[1], "license": 1}


TWO_BOXES = [(2, 3, 20, 12), (10, 8, 30, 20)]  # they overlap
CROWD = fill((0, 0, 5, 40), (50, 10, 60, 30))
OUTLINES = [
    outline(1, 7, [polygon(*box) for box in TWO_BOXES]),
    outline(2, 7, [polygon(40, 30, 60, 40)]),
    outline(3, 5, run_lengths(CROWD), crowd=1),
    outline(4, 5, [polygon(1, 1, 4, 4), [1.0, 2.0, 3.0, 4.0]]),
    outline(5, 5, [run_lengths(fill((5, 5, 9, 9)))]),
    outline(6, 9, [polygon(0, 0, 8, 8)]),
    outline(7, 9, []),
    outline(8, 99, [polygon(0, 0, 8, 8)]),
]
IMAGES = [image_entry(number) for number in (9, 7, 5)]
REFS = [
    ref(31, 7, 1, "val", sentence(10, "two boxes", "Two BOXES!"), sentence(11, "two boxes")),
    ref(30, 5, 3, "val", sentence(12, "the crowd")),
    ref(29, 7, 2, "val", sentence(13, "corner")),
    ref(28, 5, 4, "val", sentence(14, "bad"), sentence(15, "polygon")),
    ref(27, 5, 5, "val", sentence(16, "run lengths")),
    ref(26, 9, 6, "testA", sentence(17, "a man")),
    ref(25, 9, 7, "testB", sentence(18, "nothing")),
    ref(24, 9, 8, "testB", sentence(19, "of another image")),
    ref(23, 9, 404, "testB", sentence(20, "of no annotation")),
]


def write_images(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in names.items():
        (folder / name).write_bytes(encode_jpeg(number))
    return folder


def write_refer(root, *, refs=REFS, protocol=2, split_by="unc", outlines=OUTLINES, images=IMAGES):
    """``refs(SPLIT_BY).p`` and ``instances.json``, and COCO's images of 2014 in ``images``."""
    root.mkdir(parents=True, exist_ok=True)
    Path(root, f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol))
    instances = {"images": images, "annotations": outlines, "categories": [{"id": 1, "name": "x"}]}
    Path(root, "instances.json").write_text(json.dumps(instances))
    return write_images(root / "images", {i["id"]: i["file_name"] for i in images})
