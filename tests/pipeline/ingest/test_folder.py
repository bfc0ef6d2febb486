"""``ingest folder``: keys, captions in each form, masks by a pattern."""

import io
import json
import os
import tarfile
from pathlib import Path

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


def ingest_masks(folder, captions, texts, masks):
    """Ingest images with texts and masks m/NAME.png, each with other pixels; return the JSON."""
    for name, text in texts.items():
        save_image(folder / "in" / name.replace(Path(name).suffix, ".jpg"))
        (folder / "in" / name).write_bytes(text.encode())
    for number, name in enumerate(masks):
        save_mask(folder / "in" / "m" / f"{name}.png", np.eye(20, 30, k=number, dtype=bool))
    done = ingest(folder / "in", folder / "out", captions=captions, masks="m/{stem}_{i}.png")
    members = read_tar(folder / "out" / "images-00000.tar")
    phrases = {n: json.loads(x)["phrases"] for n, x in members.items() if n.endswith("json")}
    first = {n: np.array(Image.open(io.BytesIO(x))) for n, x in members.items() if "mask0" in n}
    return done, phrases, first


def test_masks_count_from_one_number_in_the_whole_folder(tmp_path):
    texts = {f"{name}.json": '{"phrases": ["left", "right"]}' for name in "ab"}
    done, phrases, first = ingest_masks(tmp_path, "json", texts, ["a_0", "a_1", "b_1"])
    assert phrases == {"a.json": ["left", "right"], "b.json": ["right"]}
    assert done.rejects == {"missing_mask": 1}
    np.testing.assert_array_equal(first["b.mask0.png"], np.eye(20, 30, k=2, dtype=bool))


def test_a_blank_or_bad_one_costs_its_phrase_alone(tmp_path):
    texts = {"a.json": '{"phrases": ["left", "", "right"]}'}
    save_image(tmp_path / "in" / "m" / "a_0.png")  # no mask: it has colours
    save_mask(tmp_path / "in" / "m" / "gone_0.png", np.eye(20, 30, dtype=bool))  # of no image
    done, phrases, first = ingest_masks(tmp_path, "json", texts, ["other", "a_1", "a_2"])
    assert phrases == {"a.json": ["right"]}
    assert done.rejects == {"bad_mask": 1, "blank_phrase": 1}
    np.testing.assert_array_equal(first["a.mask0.png"], np.eye(20, 30, k=2, dtype=bool))


def test_a_form_feed_ends_no_line(tmp_path):
    texts = {"a.txt": "the\x0cleft one\r\n\nright\u2028one\n"}
    _, phrases, _ = ingest_masks(tmp_path, "txt", texts, ["a_0", "a_1"])
    assert phrases == {"a.json": ["the left one", "right one"]}


def test_an_image_named_like_a_mask_is_one_unless_its_stem_is_anothers(tmp_path):
    for name in ("img_1.png", "img_2.jpg"):
        save_image(tmp_path / "in" / name)
    for name in ("img_1_0", "img_2_0"):
        save_mask(tmp_path / "in" / f"{name}.png", np.eye(20, 30, dtype=bool))
    found = ingest(tmp_path / "in", tmp_path / "out", captions="filename", masks="{stem}_{i}.png")
    assert (found.images, found.pairs, found.rejects) == (2, 2, {})


@pytest.mark.parametrize("kind", ["loop", "pipe", "folder"])
def test_what_is_no_file_costs_that_image_alone(tmp_path, kind):
    save_image(tmp_path / "in" / "b.jpg")
    path = tmp_path / "in" / "a.jpg"
    {"loop": lambda: path.symlink_to(path), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[
        kind
    ]()
    done = ingest(tmp_path / "in", tmp_path / "out")
    assert (done.images, sum(done.rejects.values())) == (1, 0 if kind == "folder" else 1)


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
