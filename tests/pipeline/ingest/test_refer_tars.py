"""The commands of RefCOCO's kind write tars with upright masks, negatives and ignore regions."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.__main__ import app
from tests.support.refer_files import (
    IMAGES,
    REFS,
    TWO_BOXES,
    encode_jpeg,
    fill,
    ref,
    sentence,
    write_refer,
)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_refer(tmp_path / "data")
    return tmp_path


def ingest(command):
    return CliRunner().invoke(app, f"ingest {command} --out out".split())


def read_files(root, split):
    with tarfile.open(root / "out" / f"{split}-00000.tar") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def read_mask(data):
    image = Image.open(io.BytesIO(data))
    assert image.mode == "1"
    return np.asarray(image)


REFER = "refer data --dataset refcoco --split-by unc --split val --images data/images"


def test_refer_turns_masks_as_exif_turns_the_image(root):
    turned = encode_jpeg(7, orientation=6)  # shown turned clockwise
    (root / "data" / "images" / IMAGES[1]["file_name"]).write_bytes(turned)
    (root / "data" / "images" / IMAGES[2]["file_name"]).write_bytes(encode_jpeg(5, size=(48, 64)))
    result = ingest(REFER)
    assert result.exit_code == 0, result.output
    assert "images 1 (published 1,500), pairs 3 (published 10,834)" in result.output
    files = read_files(root, "val")
    assert files["000000000007.jpg"] == turned
    assert np.array_equal(
        read_mask(files["000000000007.mask0.png"]), np.rot90(fill(*TWO_BOXES), -1)
    )
    assert json.loads(files["000000000007.json"]) == {
        "phrases": ["two boxes", "two boxes", "corner"],
        "image_id": 7,
        "ref_id": [31, 31, 29],
        "ann_id": ["1", "1", "2"],
        "sent_id": [10, 11, 13],
    }
    lines = (root / "out" / "val-00000_rejects.jsonl").read_text().splitlines()
    rejects = [json.loads(line) for line in lines]
    assert [(line["key"], line["phrase"], line["reason"]) for line in rejects] == [
        ("000000000005", "bad", "bad_polygon"),
        ("000000000005", "polygon", "bad_polygon"),
        ("000000000005", None, "size"),
    ]
    before = (root / "out" / "val-00000.tar").read_bytes()
    (root / "out" / "val-00000_stats.json").unlink()
    assert ingest(REFER).exit_code == 0
    assert (root / "out" / "val-00000.tar").read_bytes() == before


def test_a_missing_image_is_a_reject_that_names_both_files(root):
    (root / "data" / "images" / IMAGES[1]["file_name"]).unlink()
    result = ingest(REFER)
    assert result.exit_code == 0, result.output
    (reject,) = (
        json.loads(line)
        for line in (root / "out" / "val-00000_rejects.jsonl").read_text().splitlines()
        if "missing" in line
    )
    assert (reject["key"], reject["phrase"]) == ("000000000007", None)
    assert IMAGES[1]["file_name"] in reject["detail"]
    assert "000000000007.jpg neither" in reject["detail"]


def test_a_hostile_pickle_ends_the_command_and_nothing_runs_or_is_written(root):
    write_refer(root / "data", refs=[REFS[0], REFS[1] | {"split": Hostile()}])
    result = ingest(REFER)
    assert result.exit_code == 2
    assert "the class or function posix.system; nothing of it was run" in result.output
    assert sorted(path.name for path in root.iterdir()) == ["data"]


def test_grefcocos_images_keep_their_negatives(root):
    refs = [
        ref(1, 7, [2, 1], "val", sentence(1, "all boxes")),
        ref(2, 7, [-1], "val", sentence(2, "a dog")),
        ref(3, 5, [-1], "val", sentence(3, "nobody"), sentence(4, " ")),
    ]
    (root / "data" / "grefs(unc).json").write_text(json.dumps(refs))
    result = ingest("grefcoco data --split val --images data/images")
    assert result.exit_code == 0, result.output
    assert "images 2 (published 1,500), pairs 1, negatives 2" in result.output
    files = read_files(root, "val")
    found = [json.loads(files[f"00000000000{key}.json"]) for key in (5, 7)]
    assert [(one["phrases"], one["negatives"]) for one in found] == [
        ([], ["nobody"]),
        (["all boxes"], ["a dog"]),
    ]
    expected = fill(*TWO_BOXES, (40, 30, 60, 40))
    assert np.array_equal(read_mask(files["000000000007.mask0.png"]), expected)


def test_reasonsegs_ignored_regions_are_turned_too(root):
    folder = root / "data" / "val"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encode_jpeg(1, orientation=6))  # 40 px wide, 60 high when shown
    corners = [[(2, 3), (30, 3), (30, 50), (2, 50)], [(5, 10), (9, 10), (9, 20), (5, 20)]]
    shapes = [
        {"label": label, "points": points}
        for label, points in zip(("target", "ignore"), corners, strict=True)
    ]
    found = {"text": ["what is tall"], "is_sentence": True, "shapes": shapes}
    (folder / "a.json").write_text(json.dumps(found))
    result = ingest("reasonseg data --split val")
    assert result.exit_code == 0, result.output
    files = read_files(root, "val")
    ignore = fill((5, 10, 10, 21), size=(60, 40))
    assert np.array_equal(read_mask(files["a.ignore.png"]), ignore)
    target = fill((2, 3, 31, 51), size=(60, 40)) & ~ignore
    assert np.array_equal(read_mask(files["a.mask0.png"]), target)


def test_counts_that_are_not_expected_are_status_1(root):
    assert ingest(f"{REFER} --expect-images 2 --expect-pairs 5").exit_code == 0
    result = ingest(f"{REFER} --expect-images 1500")
    assert result.exit_code == 1
