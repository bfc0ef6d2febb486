"""Masks of COCO's outlines and run lengths equal pycocotools' own; each damage is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ingest.masks import (
    decode_counts,
    decode_rle,
    draw_polygon,
    draw_segmentation,
)
from pipeline.ingest.sample import IngestError
from tests.support.run_lengths import count_runs

CASES = json.loads(Path(__file__).with_name("coco_masks.json").read_text(encoding="utf-8"))
SQUARE = [2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]


def write_counts(runs):
    """COCO's string of run lengths, by a plain loop over what maskApi.c documents."""
    text = ""
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        more = True
        while more:
            piece, value = value & 31, value >> 5
            more = value != (-1 if piece & 16 else 0)
            text += chr(48 + piece + 32 * more)
    return text


@st.composite
def masks(draw):
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    pixels = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    return np.array(pixels).reshape(height, width)


def test_fixture_has_full_empty_and_partial_masks():
    shares = [np.mean(draw(case)) for case in CASES]
    assert min(shares) == 0
    assert max(shares) == 1
    assert sum(0.05 < share < 0.95 for share in shares) > 10


def draw(case):
    height, width = case["size"]
    return draw_segmentation(case["polygons"], height=height, width=width)


@pytest.mark.parametrize("case", CASES)
def test_polygons_equal_what_pycocotools_drew(case):
    height, width = case["size"]
    expected = decode_rle(case, height=height, width=width)
    assert draw(case).shape == (height, width)
    assert np.array_equal(draw(case), expected)


@given(
    points=st.lists(st.tuples(st.floats(-30, 90), st.floats(-30, 90)), min_size=3, max_size=12),
    digits=st.integers(0, 3),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
)
def test_any_polygon_is_drawn_as_pycocotools_does(points, digits, height, width):
    coco = pytest.importorskip("pycocotools.mask")
    polygon = np.array(points).round(digits).ravel().tolist()
    expected = coco.decode(coco.frPyObjects([polygon], height, width))[:, :, 0]
    assert np.array_equal(draw_polygon(polygon, height=height, width=width), expected)


@given(masks())
def test_run_lengths_and_their_string_give_the_mask_back(mask):
    height, width = mask.shape
    runs = count_runs(mask)
    for counts in (runs, write_counts(runs), write_counts(runs).encode()):
        code = {"size": [height, width], "counts": counts}
        assert np.array_equal(draw_segmentation(code, height=height, width=width), mask)


@given(st.lists(st.integers(0, 1 << 30)))
def test_string_of_counts_holds_any_lengths(runs):
    assert decode_counts(write_counts(runs)) == runs


@pytest.mark.parametrize("nothing", [[], None])
def test_annotation_without_outline_has_an_empty_mask(nothing):
    mask = draw_segmentation(nothing, height=3, width=5)
    assert mask.shape == (3, 5)
    assert not mask.any()


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1.0, 1.0, 9.0, 9.0]], "bad_polygon"),  # pycocotools: a box
        ([[1.0, 1.0, 9.0, 9.0], SQUARE], "bad_polygon"),
        ([SQUARE, [1.0, 1.0, 9.0, 9.0]], "bad_polygon"),
        ([SQUARE[:-1]], "bad_polygon"),
        ([[]], "bad_polygon"),
        (SQUARE, "bad_polygon"),  # several polygons run together: which points close one is lost
        ([[[2.0, 2.0], [8.0, 2.0], [8.0, 8.0]]], "bad_polygon"),
        ([[1.0, 2.0, float("nan"), 8.0, 8.0, 2.0]], "bad_polygon"),
        ([[1.0, 2.0, float("inf"), 8.0, 8.0, 2.0]], "bad_polygon"),
        ([[1.0, 2.0, 1e300, 8.0, 8.0, 2.0]], "bad_polygon"),
        ([[1.0, 2.0, 10**30, 8.0, 8.0, 2.0]], "bad_polygon"),
        ([[0.0, 0.0, 9e5, 9e5] * 2], "bad_polygon"),  # an outline of gigabytes
        ([["1", "2", "3", "4", "5", "6"]], "bad_polygon"),
        ([[1.0, None, 3.0, 4.0, 5.0, 6.0]], "bad_polygon"),
        ([[1.0, [2.0], 3.0, 4.0, 5.0, 6.0]], "bad_polygon"),
        ("polygon", "bad_polygon"),
        (7, "bad_polygon"),
        ({"size": [20, 10], "counts": [200]}, "size"),
        ({"size": [1 << 20, 1 << 20], "counts": [1 << 40]}, "size"),
        ({"counts": [200]}, "size"),
        ({"size": [10, 20], "counts": [3, 4]}, "bad_rle"),  # pycocotools: unset memory
        ({"size": [10, 20], "counts": [0, 201]}, "bad_rle"),
        ({"size": [10, 20], "counts": [-1, 201]}, "bad_rle"),
        ({"size": [10, 20], "counts": [100.0, 100.0]}, "bad_rle"),
        ({"size": [10, 20], "counts": ["100", "100"]}, "bad_rle"),
        ({"size": [10, 20], "counts": []}, "bad_rle"),
        ({"size": [10, 20], "counts": None}, "bad_rle"),
        ({"size": [10, 20]}, "bad_rle"),
        ({"size": [10, 20], "counts": ""}, "bad_rle"),
        ({"size": [10, 20], "counts": write_counts([100, 99])}, "bad_rle"),
        ({"size": [10, 20], "counts": write_counts([201, -1])}, "bad_rle"),
        ({"size": [10, 20], "counts": write_counts([200])[:-1]}, "bad_rle"),
        ({"size": [10, 20], "counts": "o" * 100}, "bad_rle"),  # a number without end
        ({"size": [10, 20], "counts": "é5"}, "bad_rle"),
        ({"size": [10, 20], "counts": "\x005"}, "bad_rle"),
    ],
)
def test_what_is_no_outline_of_this_image_is_refused(segmentation, reason):
    with pytest.raises(IngestError) as caught:
        draw_segmentation(segmentation, height=10, width=20)
    assert caught.value.reason == reason
    assert 10 < len(caught.value.detail) < 220
