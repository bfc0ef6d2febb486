"""Tars as the producers of web corpora write them, by their rules and with none of our code.

Each function gives a ``WebTar``: the members in their order, and what stands in them. The pictures
are small and all different.
"""

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from PIL import Image

LONG = "word and " * 556  # 5,004 characters


@dataclass
class WebTar:
    """Members, and by key the picture's bytes with the caption that is meant (None for none).

    ``num_set_aside``: members that say nothing of the picture which is read.
    """

    members: list = field(default_factory=list)
    samples: dict = field(default_factory=dict)
    num_set_aside: int = 0
    tar_format: int = tarfile.PAX_FORMAT

    def add(self, key, picture, caption, others, *, extension="jpg", stem=None):
        """Add a sample: its picture, then other members by extension."""
        self.members.append((f"{stem or key}.{extension}", picture))
        self.members += [(f"{stem or key}.{end}", data) for end, data in others.items()]
        self.samples[key] = (picture, caption)

    def write(self, path):
        with tarfile.open(path, "w", format=self.tar_format) as tar:
            for name, data in self.members:
                info = tarfile.TarInfo(name)
                info.size = 0 if data is None else len(data)
                info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
                tar.addfile(info, io.BytesIO(data or b""))
        return path


def draw(number, image_format="JPEG", size=(80, 72)):
    """Draw picture ``number`` and return its bytes."""
    pixels = np.random.default_rng(number).integers(0, 256, (9, 10, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, image_format, **({} if image_format == "PNG" else {"quality": 92}))
    return out.getvalue()


def draw_mask(size=(80, 72)):
    """A mask's PNG whose middle is set, which every crop of the picture shows."""
    mask = np.zeros(size[::-1], bool)
    mask[20:50, 20:60] = True
    out = io.BytesIO()
    Image.fromarray(mask).save(out, "PNG")
    return out.getvalue()


def describe(key, picture, caption, **more):
    """The JSON that img2dataset writes beside a picture, with its indent and its nulls."""
    width, height = Image.open(io.BytesIO(picture)).size
    facts = {
        **more,
        "caption": caption,
        "url": f"https://example.org/{key}.jpg?a=1&b=é",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": 2 * width,
        "original_height": 2 * height,
        "exif": json.dumps({"Image Make": "\x00\x01", "EXIF MakerNote": "[1, 2]"}),
        "sha256": hashlib.sha256(picture).hexdigest(),
    }
    return json.dumps(facts, indent=4).encode()


CAPTIONS = {  # as found: as meant
    "a dog on a sofa": "a dog on a sofa",
    "Two lines\nand\r\n\ta tab": "Two lines and a tab",
    "nul \x00 and bell \x07 and next line \x85 end": "nul and bell and next line end",
    "separators \u2028 \u2029 and a\u00a0hard space": "separators and a hard space",
    "  outer space  ": "outer space",
    " \n\t ": None,
    "": None,
    LONG: LONG[:1000].rstrip(),
    "日本語の説明 🌊": "日本語の説明 🌊",
    '{"phrases": ["no JSON"]}': '{"phrases": ["no JSON"]}',
}


def make_datacomp():
    """``download_upstream.py`` of DataComp: img2dataset with uid and faces, keys of 12 digits."""
    tar = WebTar()
    for i, (found, meant) in enumerate(CAPTIONS.items()):
        key, picture = f"{60000 + i:012d}", draw(i)
        faces = [[0.1, 0.2, 0.3, 0.4]] * (i % 3)
        text = describe(key, picture, found, uid=f"{i:032x}", face_bboxes=faces)
        tar.add(key, picture, meant, {"json": text, "txt": found.encode()})
        tar.num_set_aside += 1
    return tar


def make_cc12m():
    """pixparse's shards: members of a key in the order of their extensions; null captions."""
    tar = WebTar()
    for i, caption in enumerate(["a <PERSON> at the sea", None, "red car"]):
        key, picture = f"{i * 7:09d}", draw(100 + i, "WEBP" if i == 2 else "JPEG")
        others = {"json": describe(key, picture, caption), "txt": (caption or "").encode()}
        tar.add(key, picture, caption, others)
        tar.num_set_aside += 1
    return tar


def make_sa1b(num_masks=3, num_bytes=2_000_000):
    """SA-1B: pictures with masks as RLE and no phrase; its annotations may take megabytes."""
    tar = WebTar(tar_format=tarfile.GNU_FORMAT)
    tar.members.append((".", None))
    for i in range(2):
        picture = draw(200 + i)
        counts = "a`0b0" * (num_bytes // 5 // num_masks if i else 3)
        annotations = [
            {
                "bbox": [1.0, 2.0, 3.0, 4.0],
                "area": 12,
                "segmentation": {"size": [72, 80], "counts": counts},
                "predicted_iou": 0.98,
                "point_coords": [[1.5, 2.5]],
                "crop_box": [0.0, 0.0, 80.0, 72.0],
                "id": 10 * i + mask,
                "stability_score": 0.97,
            }
            for mask in range(num_masks)
        ]
        image = {"image_id": i, "width": 80, "height": 72, "file_name": f"sa_{i}.jpg"}
        text = json.dumps({"image": image, "annotations": annotations}).encode()
        tar.add(f"./sa_{i}", picture, None, {"json": text})
        tar.num_set_aside += 1
    return tar


def make_images():
    """Pictures alone, in folders, with what a Mac leaves beside them."""
    tar = WebTar(tar_format=tarfile.USTAR_FORMAT)
    tar.members += [("photos", None), ("photos/.DS_Store", b"\0\0\0\1Bud1"), ("__MACOSX", None)]
    tar.num_set_aside += 1
    for i, (extension, image_format) in enumerate(
        [("jpg", "JPEG"), ("JPG", "JPEG"), ("jpeg", "WEBP"), ("png", "PNG"), ("webp", "WEBP")]
    ):
        tar.add(f"photos/p{i}", draw(300 + i, image_format), None, {}, extension=extension)
        tar.members.append((f"__MACOSX/photos/._p{i}.{extension}", b"\0\5\x16\7"))
        tar.members.append((f"photos/._p{i}.{extension}", b"\0\5\x16\7"))
        tar.num_set_aside += 2
    return tar


def make_captions():
    """jpg + txt, with keys that hold dots and captions in other encodings."""
    tar = WebTar()
    captions = {
        "plain": (b"a cat", "a cat"),
        "photo.v2.final": (b"a second cat", "a second cat"),
        "2024.01.31/a.b": (b"a third cat", "a third cat"),
        "bom": ("\ufeffa sign".encode(), "a sign"),
        "utf16": ("a café".encode("utf-16"), "a café"),
        "latin": ("a café by night".encode("latin-1"), "a caf\ufffd by night"),
    }
    for i, (key, (data, meant)) in enumerate(captions.items()):
        tar.add(key, draw(400 + i), meant, {"txt": data})
    return tar


def make_classes():
    """jpg + cls, as ImageNet is put into WebDataset: the class is a number."""
    tar = WebTar()
    for i in range(3):
        tar.add(f"n0{i}", draw(500 + i), None, {"cls": b"%d" % i})
        tar.num_set_aside += 1
    return tar


def make_json_captions():
    """jpg + json with a caption, also one that is null, blank, a number or half an emoji."""
    tar = WebTar()
    documents = [
        ({"caption": "a boat", "uid": 7}, "a boat"),
        ({"caption": None}, None),
        ({"caption": "  "}, None),
        ({"caption": 12}, None),
        ({"caption": ["a", "b"]}, None),
        ({"caption": "half a wave \ud83c"}, "half a wave"),
        ({}, None),
    ]
    for i, (document, meant) in enumerate(documents):
        tar.add(f"{i}", draw(600 + i), meant, {"json": json.dumps(document).encode()})
        tar.num_set_aside += not isinstance(document.get("caption"), str)
    bom = b"\xef\xbb\xbf" + json.dumps({"caption": "a mark first"}).encode()
    tar.add("bom", draw(699), "a mark first", {"json": bom})
    return tar


KINDS = {
    "datacomp": make_datacomp,
    "cc12m": make_cc12m,
    "sa1b": partial(make_sa1b, num_bytes=3_000_000),
    "images": make_images,
    "captions": make_captions,
    "classes": make_classes,
    "json": make_json_captions,
}
