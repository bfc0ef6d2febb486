"""A corpus of samples with and without masks, negatives, ignore regions, phrases; and its store."""

import io
import json

import numpy as np
from PIL import Image

from pipeline.scenes.scene import draw_scene
from tests.support.plain_tar import write_tar

SIZE_PX = 64
# Of a tar's samples, again and again. Half of "ignore" and "negative" is ignored, all of "ignored".
KINDS = ("mask", "ignore", "bare", "negative", "ignored", "caption", "alone")


def write_mixed_corpus(folder):
    """Write m-train-0.tar and m-val-0.tar of all kinds, m-train-1.tar without masks, 2 with all."""
    folder.mkdir()
    for name, split, num, kinds in (
        ("m-train-0", "train", 14, KINDS),
        ("m-train-1", "train", 4, ("caption", "alone", "bare")),
        ("m-train-2", "train", 2, ("mask",)),
        ("m-val-0", "val", 14, KINDS),
    ):
        members = {}
        for number in range(num):
            scene = draw_scene(seed=1, split=split, index=number, size_px=SIZE_PX)
            for ending, data in list_members(scene, kinds[number % len(kinds)], number):
                members[f"{name}-{number:03d}.{ending}"] = data
        write_tar(folder / f"{name}.tar", members)
    return folder


def list_members(scene, kind, number):
    """Yield (ending, bytes) of one sample."""
    yield "png", encode_png(scene.image)
    if kind == "caption":
        yield "txt", f"a photo of {scene.phrases[0]}".encode()
    if kind in ("caption", "alone"):
        return
    text = {
        "phrases": list(scene.phrases),
        "task_id": [str(100 * number + i) for i in range(len(scene.phrases))],
        "negatives": ["small blue star", "heart"] if kind in ("negative", "ignored") else [],
    }
    text["negatives"] = [x for x in text["negatives"] if x not in scene.phrases]
    yield "json", json.dumps(text).encode()
    if kind == "bare":
        return
    for i, mask in enumerate(scene.masks):
        yield f"mask{i}.png", encode_png(mask.astype(np.uint8) * 255)
    if kind != "mask":
        ignore = np.zeros((SIZE_PX, SIZE_PX), bool)
        ignore[: SIZE_PX if kind == "ignored" else SIZE_PX // 2] = True
        yield "ignore.png", encode_png(ignore)


def encode_png(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return file.getvalue()
