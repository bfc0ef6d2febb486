import base64
import io

import numpy as np
import pytest
from PIL import Image

from pipeline.report.overlay import (
    TINT,
    draw_overlay,
    encode_data_uri,
    resize_for_display,
)

COLOR = (200, 0, 100)


@pytest.fixture
def image_HWC():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture
def mask_HW():
    mask_HW = np.zeros((40, 60), dtype=bool)
    mask_HW[10:20, 15:45] = True
    return mask_HW


def test_shape_and_dtype_are_kept_and_the_input_untouched(image_HWC, mask_HW):
    before_HWC = image_HWC.copy()
    drawn_HWC = draw_overlay(image_HWC, mask_HW)
    assert drawn_HWC.shape == (40, 60, 3)
    assert drawn_HWC.dtype == np.uint8
    assert np.array_equal(image_HWC, before_HWC)


def test_tint_is_half_transparent_inside(image_HWC, mask_HW):
    drawn_HWC = draw_overlay(image_HWC, mask_HW, color=COLOR)
    expected = np.rint(image_HWC[15, 30] / 2 + np.array(COLOR) / 2)
    assert np.array_equal(drawn_HWC[15, 30], expected)


def test_outline_is_opaque_inside_with_a_dark_rim_outside(image_HWC, mask_HW):
    drawn_HWC = draw_overlay(image_HWC, mask_HW, color=COLOR)
    for row, column in [(10, 30), (19, 30), (15, 15), (15, 44)]:
        assert tuple(drawn_HWC[row, column]) == COLOR
    assert np.array_equal(drawn_HWC[9, 30], np.rint(image_HWC[9, 30] * 0.4))
    assert np.array_equal(drawn_HWC[:9], image_HWC[:9])


def test_outline_widens_with_the_image():
    mask_HW = np.zeros((288, 288), dtype=bool)
    mask_HW[100:300, 100:300] = True
    drawn_HWC = draw_overlay(np.zeros((288, 288, 3), dtype=np.uint8), mask_HW, color=COLOR)
    assert int((drawn_HWC[100:200, 200] == COLOR).all(axis=-1).sum()) == 3


def test_frame_has_no_outline(image_HWC):
    drawn_HWC = draw_overlay(image_HWC, np.ones((40, 60), dtype=bool), color=COLOR)
    assert np.array_equal(drawn_HWC, np.rint(image_HWC / 2 + np.array(COLOR) / 2))


def test_mask_at_one_edge_leaves_the_opposite_edge_alone(image_HWC):
    for edge in (np.s_[:5], np.s_[-5:], np.s_[:, :5], np.s_[:, -5:]):
        mask_HW = np.zeros((40, 60), dtype=bool)
        mask_HW[edge] = True
        changed_HW = (draw_overlay(image_HWC, mask_HW, color=COLOR) != image_HWC).any(axis=-1)
        # Five rows or columns of the mask and the rim beside them.
        assert changed_HW.sum() <= 6 * max(mask_HW[edge].shape)


def test_empty_mask_changes_nothing(image_HWC):
    assert np.array_equal(draw_overlay(image_HWC, np.zeros((40, 60), dtype=bool)), image_HWC)


def test_probability_scales_the_tint_and_is_outlined_above_half():
    image_HWC = np.zeros((9, 9, 3), dtype=np.uint8)
    probability_HW = np.full((9, 9), 0.2, dtype=np.float32)
    probability_HW[2:7, 2:7] = 0.8
    drawn_HWC = draw_overlay(image_HWC, probability_HW)
    assert tuple(drawn_HWC[0, 0]) == tuple(np.rint(np.array(TINT) * 0.1))
    assert tuple(drawn_HWC[4, 4]) == tuple(np.rint(np.array(TINT) * 0.4))
    assert tuple(drawn_HWC[2, 4]) == TINT


def test_half_itself_is_background(image_HWC):
    probability_HW = np.zeros((40, 60))
    probability_HW[10:20, 15:45] = 0.5
    drawn_HWC = draw_overlay(image_HWC, probability_HW, color=COLOR)
    tinted_HWC = np.rint(image_HWC * 0.75 + np.array(COLOR) * 0.25)
    assert np.array_equal(drawn_HWC[10:20, 15:45], tinted_HWC[10:20, 15:45])
    assert np.array_equal(drawn_HWC[9], image_HWC[9])


@pytest.mark.parametrize(
    ("mask_HW", "message"),
    [
        (np.zeros((60, 40), dtype=bool), r"must be \(H, W\) = \(40, 60\), but got \(60, 40\)"),
        (np.zeros((40, 60, 1), dtype=bool), r"but got \(40, 60, 1\); resize it first"),
        (np.zeros((40, 60), dtype=np.uint8), r"bool or float, but got uint8; pass mask.astype"),
        (np.full((40, 60), 1.5), r"in \[0, 1\], but got 1.5 to 1.5; take the sigmoid"),
        (np.full((40, 60), -0.1), r"in \[0, 1\], but got -0.1 to -0.1"),
        (np.linspace(-3, 2, 2400).reshape(40, 60), r"in \[0, 1\], but got -3 to 2; take the"),
        (np.full((40, 60), np.nan), r"in \[0, 1\], but got nan to nan"),
    ],
)
def test_bad_mask_is_refused(image_HWC, mask_HW, message):
    with pytest.raises(ValueError, match=message):
        draw_overlay(image_HWC, mask_HW)


@pytest.mark.parametrize(
    "image_HWC",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)],
)
def test_bad_image_is_refused(image_HWC):
    with pytest.raises(ValueError, match=r"image must be \(H, W, 3\) uint8 RGB, but got \(4, 4"):
        draw_overlay(image_HWC, np.zeros((4, 4), dtype=bool))


def test_small_array_is_enlarged_by_whole_pixels(mask_HW, image_HWC):
    assert np.array_equal(resize_for_display(mask_HW, 180)[::3, ::3], mask_HW)
    assert resize_for_display(image_HWC, 180).shape == (120, 180, 3)
    assert np.array_equal(resize_for_display(image_HWC, 180)[2::3, 2::3], image_HWC)
    assert resize_for_display(image_HWC, 41) is not image_HWC
    assert resize_for_display(image_HWC, 41).shape == (40, 60, 3)


def test_large_array_is_averaged(mask_HW):
    image_HWC = np.zeros((40, 60, 3), dtype=np.uint8)
    image_HWC[:, ::2] = 100
    assert (resize_for_display(image_HWC, 30) == 50).all()
    small_HW = resize_for_display(mask_HW, 30)
    assert small_HW.dtype == np.bool_
    assert np.array_equal(small_HW, mask_HW[::2, ::2] & mask_HW[1::2, 1::2])
    probability_HW = np.tile(np.array([0.0, 1.0]), (40, 30))
    assert np.allclose(resize_for_display(probability_HW, 30), 0.5)


def test_data_uri_holds_the_picture():
    flat_HWC = np.full((40, 60, 3), 7, dtype=np.uint8)
    kind, data = encode_data_uri(flat_HWC).split(";base64,")
    assert kind == "data:image/png"
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(data))), flat_HWC)


def test_photograph_is_stored_as_jpeg(image_HWC):
    kind, data = encode_data_uri(image_HWC).split(";base64,")
    assert kind == "data:image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (60, 40)
