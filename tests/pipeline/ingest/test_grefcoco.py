"""gRefCOCO's phrases of several objects are their union, and those of none are negatives."""

import json
import pickle

import numpy as np
import pytest

from pipeline.ingest.grefcoco import list_grefcoco
from pipeline.ingest.refer import list_refer
from tests.support.refer_files import (
    CROWD,
    IMAGES,
    fill,
    outline,
    polygon,
    ref,
    run_lengths,
    sentence,
    write_images,
)

OUTLINES = [
    outline(1, 7, [polygon(2, 3, 20, 12)]),
    outline(2, 7, [polygon(10, 8, 30, 20)]),
    outline(3, 7, run_lengths(CROWD), crowd=1),
]
REFS = [
    ref(1, 7, [2, 1], "val", sentence(10, "both boxes"), sentence(11, "the boxes")),
    ref(2, 7, [-1], "val", sentence(12, "a dog"), sentence(13, "a cat")),
    ref(3, 7, [1, 3], "val", sentence(14, "a box and a crowd")),
    ref(4, 7, 2, "val", sentence(15, "one box")),
    ref(5, 7, [3], "val", sentence(16, "the crowd")),
    ref(6, 7, [1, -1], "val", sentence(17, "half of it is missing")),
    ref(7, 5, [-1], "val", sentence(18, "nobody")),
    ref(8, 9, [1], "testA", sentence(19, "elsewhere")),
]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "grefs(unc).json").write_text(json.dumps(REFS))
    instances = {"images": IMAGES, "annotations": OUTLINES}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    write_images(tmp_path / "images", {i["id"]: i["file_name"] for i in IMAGES})
    return tmp_path


def test_masks_are_merged_without_crowds_and_no_target_makes_negatives(root):
    listing = list_grefcoco(root, split="val", images=root / "images")
    empty, sample = (recipe.build() for recipe in listing.recipes)
    found = {phrase.text: phrase for phrase in sample.phrases}
    first, second = fill((2, 3, 20, 12)), fill((10, 8, 30, 20))
    expected = {
        "both boxes": first | second,
        "the boxes": first | second,
        "a box and a crowd": first,
        "one box": second,
        "the crowd": fill(),
    }
    assert list(found) == list(expected)
    for text, mask in expected.items():
        assert np.array_equal(found[text].mask, mask), text
    assert found["both boxes"].ids == {"ref_id": 1, "ann_id": "2 1", "sent_id": 10}
    assert sample.negatives == ("a dog", "a cat")
    assert [(text, reason) for text, reason, _ in sample.rejects] == [
        ("half of it is missing", "no_annotation")
    ]
    assert (empty.phrases, empty.negatives) == ((), ("nobody",))
    assert listing.listed == {"images": 2, "refs": 7, "pairs": 6, "negatives": 3}
    assert listing.published == {"images": 1500}


def test_an_annotation_of_another_image_is_not_drawn(root):
    (recipe,) = list_grefcoco(root, split="testA", images=root / "images").recipes
    assert [reason for _, reason, _ in recipe.build().rejects] == ["other_image"]


def test_refcoco_has_no_such_rules(root):
    """There -1 is an annotation that is not there, and a crowd is an object as others are."""
    (root / "refs(unc).p").write_bytes(pickle.dumps([REFS[1], REFS[4]]))
    options = {"dataset": "refcoco", "split_by": "unc", "split": "val", "images": root / "images"}
    (recipe,) = list_refer([root], **options).recipes
    sample = recipe.build()
    assert sample.negatives == ()
    assert [reason for _, reason, _ in sample.rejects] == ["no_annotation"] * 2
    assert np.array_equal(sample.phrases[0].mask, CROWD)
