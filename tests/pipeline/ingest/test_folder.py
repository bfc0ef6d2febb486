"""``ingest folder``: keys, captions in each form, masks by a pattern."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from pipeline.ingest.folder import list_folder
from pipeline.ingest.run import run_ingest


def save_image(path, *, size=(30, 20), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def save_mask(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def ingest(folder, out, *, captions="none", masks=None, **options):
    listing = list_folder(folder, captions=captions, masks=masks)
    options = {"arguments": {}, "shard_bytes": 10**9, **options}
    return run_ingest(listing, str(out), **options)


def read_tar(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_keys_are_safe_and_distinct(tmp_path):
    names = ["b.jpg", "a.b.jpg", "a_b.jpg", "é x.jpg", "sub/a.png", "sub__a.jpg", "t.jpg", "t.png"]
    for name in names:
        save_image(tmp_path / "in" / name)
    (tmp_path / "in" / ".hidden.jpg").write_bytes(b"")
    listing = list_folder(tmp_path / "in", captions="none", masks=None)
    keys = [recipe.key for recipe in listing.recipes]
    assert len(set(keys)) == len(names) == listing.listed["images"]
    assert {"b", "a_b", "sub__a"} <= set(keys), "plain paths are kept"
    assert all(key.replace("_", "").replace("-", "").isalnum() and key.isascii() for key in keys)
    assert listing.notes == ("files that are no images: hidden 1",)


@pytest.mark.parametrize(
    ("captions", "beside", "expected"),
    [
        ("none", {"red_cat.txt": "a dog"}, None),
        ("filename", {}, {"phrases": ["red cat"]}),
        ("txt", {"red_cat.txt": "\ufeffa dog\nat home \n"}, {"phrases": ["a dog at home"]}),
        ("txt", {"red_cat.txt": " \n"}, None),
        ("txt", {}, None),
        ("json", {"red_cat.json": '{"caption": "a dog", "x": 1}'}, {"phrases": ["a dog"]}),
        (
            "json",
            {"red_cat.json": '{"phrases": ["a", "b"], "negatives": ["c"]}'},
            {"phrases": ["a", "b"], "negatives": ["c"]},
        ),
    ],
)
def test_captions_of_each_form(tmp_path, captions, beside, expected):
    save_image(tmp_path / "in" / "red_cat.jpg")
    for name, text in beside.items():
        (tmp_path / "in" / name).write_text(text, encoding="utf-8")
    done = ingest(tmp_path / "in", tmp_path / "out", captions=captions)
    members = read_tar(tmp_path / "out" / "images-00000.tar")
    assert members["red_cat.jpg"] == (tmp_path / "in" / "red_cat.jpg").read_bytes()
    text = members.get("red_cat.json")
    assert (None if text is None else json.loads(text)) == expected
    assert (done.images, done.without_phrase) == (1, expected is None)
    assert done.pairs == (len(expected["phrases"]) if expected else 0)


@pytest.mark.parametrize(
    ("pattern", "first"),
    [("masks/{stem}_{i}.png", 0), ("masks/{stem}_{i}.png", 1), ("../m/{dir}/{stem}-{i:03}.png", 1)],
)
def test_masks_are_one_a_phrase_in_order(tmp_path, pattern, first):
    save_image(tmp_path / "in" / "sub" / "a.jpg")
    (tmp_path / "in" / "sub" / "a.txt").write_text("a cat\n\nno pixel\na dog\ngone\n")
    masks = np.random.default_rng(0).random((3, 20, 30)) > 0.5
    masks[1] = False
    for number, mask in enumerate(masks):
        save_mask(tmp_path / "in" / pattern.format(stem="a", dir="sub", i=first + number), mask)
    done = ingest(tmp_path / "in", tmp_path / "out", captions="txt", masks=pattern)
    assert (done.images, done.pairs) == (1, 2)
    assert done.rejects == {"missing_mask": 1, "empty_mask": 1}
    members = read_tar(tmp_path / "out" / "images-00000.tar")
    assert json.loads(members["sub__a.json"]) == {"phrases": ["a cat", "a dog"]}
    for name, expected in (("mask0", masks[0]), ("mask1", masks[2])):
        written = Image.open(io.BytesIO(members[f"sub__a.{name}.png"]))
        assert written.mode == "1"
        np.testing.assert_array_equal(np.array(written), expected)


def test_one_mask_holds_for_all_phrases_of_an_image(tmp_path):
    save_image(tmp_path / "a.jpg")
    (tmp_path / "a.json").write_text('{"phrases": ["a cat", "the animal"]}')
    save_mask(tmp_path / "a.png", np.eye(20, 30, dtype=bool))
    done = ingest(tmp_path, tmp_path / "out", captions="json", masks="{stem}.png")
    assert (done.images, done.pairs, done.rejects) == (1, 2, {})
    members = read_tar(tmp_path / "out" / "images-00000.tar")
    assert members["a.mask0.png"] == members["a.mask1.png"]


def test_more_masks_than_phrases_are_told(tmp_path):
    save_image(tmp_path / "a.jpg")
    save_image(tmp_path / "b.jpg")
    for name in ("a_0", "a_1", "b_0"):
        save_mask(tmp_path / "m" / f"{name}.png", np.eye(20, 30, dtype=bool))
    done = ingest(tmp_path, tmp_path / "out", captions="filename", masks="m/{stem}_{i}.png")
    assert (done.images, done.rejects) == (1, {"mask_count": 1})


@pytest.mark.parametrize(
    ("masks", "captions", "match"),
    [
        ("masks/x_{i}.png", "txt", "has no {stem}"),
        ("{stem", "txt", "expected a pattern"),
        ("{name}.png", "txt", "expected a pattern"),
        ("{stem}.png", "none", "expected phrases for the masks"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(tmp_path, masks, captions, match):
    with pytest.raises(ValueError, match=match):
        list_folder(tmp_path, captions=captions, masks=masks)
