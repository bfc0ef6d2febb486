"""Views: which square of an image, and that image and mask are cut alike."""

import numpy as np
import pytest
from PIL import Image

from pipeline.decode.views import (
    MAX_CROP_TRIES,
    MAX_VIEW_PX,
    Box,
    Cutting,
    centre_box,
    cut_image,
    cut_mask,
    cut_phrase,
    mirror,
    phrase_box,
    whole_box,
)
from pipeline.spec.fields import LatentsSpec


def draw_with(values):
    """A source of integers that gives these in turn and notes what it was asked."""
    asked = []

    def choose(low, high, *, draw):
        asked.append((draw, low, high))
        return values[len(asked) - 1]

    return choose, asked


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (100, 60, Box(20, 0, 80, 60)),
        (60, 100, Box(0, 20, 60, 80)),
        (61, 60, Box(0, 0, 60, 60)),
        (7, 7, Box(0, 0, 7, 7)),
        (1, 9, Box(0, 4, 1, 5)),
    ],
)
def test_the_centre_box_is_the_largest_square(width, height, box):
    assert centre_box(width, height) == box
    assert whole_box(width, height) == Box(0, 0, width, height)


def test_the_first_square_with_enough_of_the_mask_is_taken():
    mask = np.zeros((10, 40), bool)
    mask[:, 30:] = True
    draw, asked = draw_with([0, 0, 25, 0, 30, 0])
    assert phrase_box(mask, draw) == Box(25, 0, 35, 10)
    assert asked == [(0, 0, 31), (1, 0, 1), (2, 0, 31), (3, 0, 1)]


def test_five_percent_is_not_more_than_five_percent():
    mask = np.zeros((10, 40), bool)
    mask[0, 0:5] = True  # 5 of the 100 pixels of a square at 0
    mask[0:6, 30] = True  # 6 of those at 30
    draw, _ = draw_with([0, 0, 30, 0])
    assert phrase_box(mask, draw) == Box(30, 0, 40, 10)


def test_else_the_square_that_holds_most_is_taken():
    mask = np.zeros((100, 300), bool)
    mask[50, 150:153] = True
    lefts = [0] * MAX_CROP_TRIES
    lefts[7], lefts[9], lefts[20] = 52, 53, 60  # holding 2, 3 and again 3 of 3 pixels
    draw, asked = draw_with([value for left in lefts for value in (left, 0)])
    assert phrase_box(mask, draw) == Box(53, 0, 153, 100)
    assert len(asked) == 2 * MAX_CROP_TRIES


def test_a_square_image_has_one_square():
    mask = np.zeros((8, 8), bool)
    mask[0, 0] = True
    draw, asked = draw_with([0, 0])
    assert phrase_box(mask, draw) == Box(0, 0, 8, 8)
    assert len(asked) == 2


@pytest.mark.parametrize("flip", [False, True])
def test_image_and_mask_are_cut_alike(flip):
    mask = np.zeros((40, 60), bool)
    mask[8:24, 20:44] = True
    image = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255
    box = Box(4, 0, 44, 40)
    cut = cut_mask(mask, box, size=80)
    view = cut_image(Image.fromarray(image), box, size=80)
    if flip:
        cut, view = mirror(cut), mirror(view)
    assert view.shape == (80, 80, 3)
    assert cut.shape == (80, 80)
    assert view.dtype == cut.dtype == np.uint8
    expected = np.zeros((80, 80), np.uint8)
    expected[16:48, 32:80] = 1
    np.testing.assert_array_equal(cut, expected[:, ::-1] if flip else expected)
    assert ((view[..., 0] > 127) == cut).mean() > 0.97  # bilinear edges


def test_a_view_of_the_models_size_is_the_image_itself():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    box = whole_box(64, 64)
    view = cut_image(Image.fromarray(image), box, size=64)
    np.testing.assert_array_equal(view, image)
    np.testing.assert_array_equal(mirror(view), image[:, ::-1])


def test_shrinking_averages_what_it_leaves_out():
    """Antialiased: a one-pixel checkerboard becomes grey, not black or white."""
    board = (np.indices((128, 128)).sum(axis=0) % 2 * 255).astype(np.uint8)
    image = np.repeat(board[..., None], 3, axis=2)
    view = cut_image(Image.fromarray(image), whole_box(128, 128), size=32)
    assert abs(view.astype(int) - 127).max() < 12


def test_the_whole_box_squeezes():
    image = np.zeros((10, 40, 3), np.uint8)
    image[:, 20:] = 200
    view = cut_image(Image.fromarray(image), whole_box(40, 10), size=64)
    assert view.shape == (64, 64, 3)
    assert (view[:, :28] == 0).all()
    assert (view[:, 36:] == 200).all()


def test_a_mask_stays_zero_and_one():
    mask = np.random.default_rng(0).random((97, 61)) < 0.5
    cut = mirror(cut_mask(mask, Box(3, 7, 50, 54), size=128))
    assert set(np.unique(cut)) == {0, 1}


@pytest.mark.parametrize(("crop", "side"), [("center", 1500), ("resize", 2000)])
@pytest.mark.parametrize("place", [2 / 64, 3.5 / 128])
def test_a_mask_too_thin_for_the_view_is_told_from_one_outside_it(crop, side, place):
    """A line between the samples: of a crop of side S at n px, column i is (i + 1/2) * S / n."""
    box = centre_box(2000, 1500) if crop == "center" else whole_box(2000, 1500)
    mask = np.zeros((1500, 2000), bool)
    mask[200:1300, box.left + int(place * side)] = True
    cutting = Cutting(64, crop, 1, False, 1, 0)
    ((cut, small),) = cut_phrase(mask, 0, cutting, key="k")
    assert not cut.shown
    assert not small.any()
    assert cut.needs_px % 64 == 0
    assert (cut.needs_px == 128) == (place == 3.5 / 128)
    assert cut_mask(mask, box, size=cut.needs_px).any()
    assert not cut_mask(mask, box, size=cut.needs_px // 2).any()
    outside = np.zeros((1500, 2000), bool)
    outside[0, 0] = True
    ((cut, _),) = cut_phrase(outside, 0, Cutting(64, "center", 1, False, 1, 0), key="k")
    assert (cut.shown, cut.needs_px) == (False, 0)
    mask[:, box.left : box.left + 200] = True
    ((cut, _),) = cut_phrase(mask, 0, cutting, key="k")
    assert (cut.shown, cut.needs_px) == (True, 0)


def test_a_mask_that_no_size_shows_is_found_in_bounded_memory():
    mask = np.zeros((1, 1_000_000), bool)
    mask[0, 1] = True
    ((cut, _),) = cut_phrase(mask, 0, Cutting(384, "resize", 1, False, 1, 0), key="k")
    assert cut.needs_px > MAX_VIEW_PX
    LatentsSpec(model="m", size=MAX_VIEW_PX)
    with pytest.raises(ValueError, match="size"):
        LatentsSpec(model="m", size=MAX_VIEW_PX + 64)
