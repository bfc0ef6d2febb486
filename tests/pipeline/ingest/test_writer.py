"""One sample as members: EXIF's turns, JSON, and what is no pair."""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.ingest.sample import Phrase, Sample
from pipeline.ingest.writer import encode_members

MASK = np.random.default_rng(0).random((20, 30)) > 0.5
CAT = Phrase("a cat", MASK)


def make_image(turn=1, kind="PNG"):
    """An image of the mask in black and white, with EXIF's orientation."""
    pixels = np.stack([MASK * 255] * 3, axis=2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind, exif=exif, lossless=True, quality=95)
    return file.getvalue()


def read_mask(data):
    image = Image.open(io.BytesIO(data))
    assert image.mode == "1"
    return np.array(image)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_masks_and_ignore_are_turned_as_their_image(turn, kind):
    image = make_image(turn, kind)
    made = encode_members(Sample(image, (CAT,), ignore=MASK))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(image)))
    expected = np.array(upright.convert("RGB"))[:, :, 0] > 127
    np.testing.assert_array_equal(read_mask(made.files["mask0.png"]), expected)
    np.testing.assert_array_equal(read_mask(made.files["ignore.png"]), expected)
    assert made.files[{"JPEG": "jpg"}.get(kind, kind.lower())] == image


def test_ids_of_phrases_stand_in_lists_and_ids_of_the_image_alone():
    phrases = (
        Phrase(" a\tcat\n", MASK, {"task_id": "1", "ann_id": 7}),
        Phrase("nothing", MASK & False, {"task_id": "2"}),
        Phrase("the same", MASK, {"task_id": "3"}),
    )
    made = encode_members(
        Sample(make_image(), phrases, negatives=("a dog", " "), ids={"image_id": 5})
    )
    assert json.loads(made.files["json"]) == {
        "phrases": ["a cat", "the same"],
        "negatives": ["a dog"],
        "image_id": 5,
        "task_id": ["1", "3"],
        "ann_id": [7, None],
    }
    assert sorted(made.files) == ["json", "mask0.png", "mask1.png", "png"]
    assert (made.num_phrases, made.num_negatives) == (2, 1)
    assert [(one.phrase, one.reason) for one in made.rejects] == [("nothing", "empty_mask")]


@pytest.mark.parametrize(
    ("sample", "reasons"),
    [
        (Sample(b"GIF89a", (CAT,)), ["bad_image"]),
        (Sample(make_image()[:-30], (CAT,)), ["bad_image"]),
        (Sample(make_image(), (Phrase("a", MASK[1:]),)), ["size"]),
        (Sample(make_image(6), (Phrase("a", MASK.T),)), ["size"]),
        (Sample(make_image(), (CAT,), ignore=MASK[:, 1:]), ["size"]),
        (Sample(make_image(), (Phrase("\x00 ", MASK),)), ["blank_phrase", "no_phrase"]),
        (
            Sample(make_image(), rejects=(("a", "no_area", "none"),)),
            ["no_area", "no_phrase"],
        ),
    ],
)
def test_an_image_of_which_nothing_is_left_goes_with_its_reason(sample, reasons):
    made = encode_members(sample)
    assert made.files == {}
    assert [one.reason for one in made.rejects] == reasons
    assert made.rejects[-1].phrase is None


@pytest.mark.parametrize(
    ("sample", "expected", "reasons"),
    [
        (Sample(make_image()), None, []),
        (Sample(make_image(), ids={"image_id": "x"}), {"image_id": "x"}, []),
        (
            Sample(make_image(), (Phrase("a", MASK & False),), ("b",)),
            {"phrases": [], "negatives": ["b"]},
            ["empty_mask"],
        ),
        (
            Sample(make_image(), (Phrase("a b"),), ("A  b", "c", "C", *map(str, range(1000)))),
            {"phrases": ["a b"], "negatives": ["c", *map(str, range(999))]},
            ["contradicted_negative", "too_many_phrases"],
        ),
        (Sample(make_image(), (Phrase("a" * 2000),)), {"phrases": ["a" * 1000]}, []),
        (
            Sample(make_image(), (Phrase("a"),) * 1001),
            {"phrases": ["a"] * 1000},
            ["too_many_phrases"],
        ),
    ],
    ids=["alone", "with an id", "negative", "negatives", "long", "many"],
)
def test_an_image_stays_with_what_is_left(sample, expected, reasons):
    made = encode_members(sample)
    assert made.files["png"] == sample.image
    assert (json.loads(made.files["json"]) if "json" in made.files else None) == expected
    assert [one.reason for one in made.rejects] == reasons


def test_an_image_over_the_pixel_cap_is_not_decoded():
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, format="PNG")
    assert [one.reason for one in encode_members(Sample(file.getvalue())).rejects] == ["too_large"]
