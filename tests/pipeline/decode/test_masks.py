"""Masks: foreground of every kind of PNG by its rule, and what must be refused."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.decode.images import BadImageError
from pipeline.decode.masks import decode_mask
from tests.support.pictures import encode, make_chunk, make_png

HEIGHT, WIDTH = 24, 32
GREY = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
BITS = GREY > 100
RED, BLUE, BLACK, WHITE = (200, 0, 0), (0, 0, 200), (0, 0, 0), (255, 255, 255)


def pack(values, bits):
    """One row of a PNG with so many bits a pixel."""
    text = "".join(f"{value:0{bits}b}" for value in values)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8))


def grey(values, bits, *, before=b""):
    return make_png([pack(values, bits)], bits=bits, colour=0, width=len(values), before=before)


def palette(values, *colours, bits=8, alpha=None):
    before = make_chunk(b"PLTE", bytes(np.uint8(colours)))
    before += make_chunk(b"tRNS", bytes(alpha)) if alpha is not None else b""
    return make_png([pack(values, bits)], bits=bits, colour=3, width=len(values), before=before)


def decode_row(data, **options):
    width = struct.unpack_from(">I", data, 16)[0]
    pixels, by_half_value = decode_mask(data, size=(1, width), **options)
    assert pixels.dtype == bool
    return pixels[0].astype(int).tolist(), by_half_value


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("most", ["one", "all"])
def test_zero_and_one_as_zero_and_the_largest_are_background_and_foreground(bits, most):
    high = 1 if most == "one" else (1 << bits) - 1
    assert decode_row(grey([0, high, high, 0, 0], bits)) == ([0, 1, 1, 0, 0], False)
    assert decode_row(grey([high, high], bits)) == ([1, 1], False)


def test_sixteen_bits_may_hold_eight():
    assert decode_row(grey([0, 255, 0], 16)) == ([0, 1, 0], False)


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (2, [0, 1, 2, 3], [0, 0, 1, 1]),
        (2, [0, 2], [0, 1]),
        (4, [0, 7, 8, 15], [0, 0, 1, 1]),
        (8, [0, 127, 128, 255], [0, 0, 1, 1]),
        (8, [0, 1, 255], [0, 0, 1]),
        (8, [0, 254], [0, 1]),
        (16, [0, 32767, 32768, 65535], [0, 0, 1, 1]),
        (16, [0, 255, 65535], [0, 0, 1]),
    ],
)
def test_of_other_values_half_of_the_range_is_foreground_and_it_is_said(bits, values, expected):
    assert decode_row(grey(values, bits)) == (expected, True)


def test_masks_as_pillow_writes_them():
    for pixels in (BITS, BITS.astype(np.uint8), BITS * np.uint8(255), BITS * np.uint16(65535)):
        mask = decode_mask(encode(pixels), size=BITS.shape)
        np.testing.assert_array_equal(mask.pixels, BITS)
        assert not mask.by_half_value
    image = Image.fromarray(BITS.astype(np.uint8)).convert("P")
    image.putpalette([*BLUE, *RED])
    np.testing.assert_array_equal(decode_mask(encode(image), size=BITS.shape).pixels, BITS)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("colours", "expected"),
    [
        ((BLACK, WHITE), [0, 1, 0]),
        ((BLACK, RED), [0, 1, 0]),
        ((WHITE, BLACK), [1, 0, 1]),  # an optimizer's order
        ((RED, BLACK), [1, 0, 1]),
        ((RED, BLUE), [0, 1, 0]),
        ((WHITE, RED), [0, 1, 0]),
        ((BLACK, BLACK), [0, 1, 0]),
        ((BLACK, (1, 1, 1)), [0, 1, 0]),
    ],
)
def test_black_is_a_palette_s_background_and_else_index_0(colours, expected, bits):
    assert decode_row(palette([0, 1, 0], *colours, bits=bits)) == (expected, False)


def test_indices_need_not_follow_each_other():
    colours = [BLACK] + [RED] * 254 + [WHITE]
    assert decode_row(palette([0, 255, 0], *colours)) == ([0, 1, 0], False)
    assert decode_row(palette([7, 9], *[RED] * 9, BLACK)) == ([1, 0], False)


@pytest.mark.parametrize(
    ("values", "colours"), [([1, 1], (BLACK, RED)), ([0, 0], (WHITE,)), ([0, 0], (WHITE, BLACK))]
)
def test_a_lone_colour_that_is_foreground(values, colours):
    assert decode_row(palette(values, *colours)) == ([1, 1], False)


@pytest.mark.parametrize(
    ("values", "colours", "background"),
    [([0, 0], (BLACK, RED), 0), ([0, 0], (RED, BLUE), 0), ([1, 1], (RED, BLACK), 1)],
)
def test_a_lone_colour_that_is_background(values, colours, background):
    data = palette(values, *colours)
    message = f"empty: every pixel is of palette index {background}, which is background"
    with pytest.raises(BadImageError, match=message):
        decode_row(data)
    assert decode_row(data, may_be_empty=True) == ([0, 0], False)


def test_more_indices_than_two_are_named():
    with pytest.raises(
        BadImageError, match="at most two palette indices, got 3: 0, 2, 3; a map of"
    ):
        decode_row(palette([0, 3, 2], BLACK, RED, BLUE, WHITE))
    with pytest.raises(
        BadImageError, match=r"got 50: 0, 1, .*, 9, \.\.\.; .* by ldznet ingest lab"
    ):
        decode_row(palette(range(50), *[RED] * 50))


def test_two_indices_of_which_none_is_a_background_are_refused():
    message = r"expected index 0 or a black colour as the background, got 1 \(\(200, 0, 0\)\), 2"
    for third in (BLUE, RED):
        with pytest.raises(BadImageError, match=message):
            decode_row(palette([1, 2], BLACK, RED, third))
    with pytest.raises(BadImageError, match=r"got 1 \(\(0, 0, 0\)\), 2 \(\(0, 0, 0\)\)"):
        decode_row(palette([1, 2], RED, BLACK, BLACK))


def test_an_index_outside_the_palette_is_refused():
    with pytest.raises(BadImageError, match="a pixel of colour 2 in a palette of 2"):
        decode_row(palette([0, 2], BLACK, WHITE))


@pytest.mark.parametrize(
    ("data", "is_clear"),
    [
        (palette([0, 1], BLACK, WHITE, alpha=[255, 255]), False),
        (palette([0, 1], BLACK, WHITE, alpha=[0]), False),
        (palette([0, 1], BLACK, WHITE, alpha=[0, 128]), False),  # as an overlay is drawn
        (palette([0, 1], BLACK, WHITE, WHITE, alpha=[255, 255, 0]), False),
        (palette([0, 1], BLACK, WHITE, alpha=[255, 0]), True),
        (palette([0, 1], BLACK, WHITE, alpha=[0, 0]), True),
        (grey([0, 1], 1, before=make_chunk(b"tRNS", b"\0\0")), False),
        (grey([0, 1], 1, before=make_chunk(b"tRNS", b"\0\1")), True),
        (grey([0, 3], 4, before=make_chunk(b"tRNS", b"\0\0")), None),
        (grey([0, 15], 4, before=make_chunk(b"tRNS", b"\0\x0f")), True),
        (grey([0, 255], 8, before=make_chunk(b"tRNS", b"\0\7")), False),
        (grey([0, 255], 8, before=make_chunk(b"tRNS", b"\0\xff")), True),
        (grey([0, 65535], 16, before=make_chunk(b"tRNS", b"\xff\xff")), True),
    ],
)
def test_transparency_is_not_looked_at_unless_the_foreground_is_transparent(data, is_clear):
    if is_clear is False:
        assert decode_row(data) == ([0, 1], False)
    else:
        message = (
            "corrupt: the foreground .* is transparent" if is_clear else "empty: no value of 8"
        )
        with pytest.raises(BadImageError, match=message):
            decode_row(data)


def test_a_mask_s_own_orientation_is_not_looked_at():
    exif = Image.Exif()
    exif[0x0112] = 6
    mask = decode_mask(encode(GREY, exif=exif), size=GREY.shape)
    np.testing.assert_array_equal(mask.pixels, GREY >= 128)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *(
            (encode(Image.fromarray(BITS).convert(mode)), f"corrupt: expected .* got {mode}: save")
            for mode in ("RGB", "RGBA", "LA")
        ),
        (encode(GREY, "JPEG"), "corrupt: expected PNG, got JPEG"),
        (encode(GREY, "GIF"), "corrupt: expected PNG, got GIF"),
        (encode(GREY.T), "wrong_size: expected 32x24 as the image is, got 24x32"),
        (encode(GREY * 0), "empty: every pixel is 0"),
        (encode(GREY > 255), "empty: every pixel is 0"),
        (encode(GREY % 3), "empty: no value of 128 or more; the largest is 2; a map of classes"),
        (encode(GREY)[:-13], "corrupt: PNG chunk b'IDAT' at byte 33: cut short"),
        (encode(GREY)[:-12], "corrupt: Pillow: error: unpack_from requires"),
        (b"", "corrupt: expected PNG, got no bytes"),
    ],
)
def test_masks_that_are_refused(data, message):
    with pytest.raises(BadImageError, match=message):
        decode_mask(data, size=GREY.shape)


@pytest.mark.parametrize("bits", [1, 2, 8, 16])
def test_a_region_may_be_empty_but_never_by_values_that_are_not_understood(bits):
    assert decode_row(grey([0, 0], bits), may_be_empty=True) == ([0, 0], False)
    if bits > 2:
        with pytest.raises(BadImageError, match=r"empty: no value of .* the largest is 2; a map"):
            decode_row(grey([0, 2], bits), may_be_empty=True)


@pytest.mark.parametrize("orientation", ["apply", "ignore"])
def test_a_mask_that_fits_the_image_otherwise_turned_is_told_so(orientation):
    choices = {"apply": ("is once upright", "ignore"), "ignore": ("is stored", "apply")}
    applied, other = choices[orientation]
    for turn, shape, got in ((6, (WIDTH, HEIGHT), "24x32"), (6, (9, 9), "9x9"), (3, (9, 9), "9x9")):
        with pytest.raises(
            BadImageError, match=f"32x24 as the image {applied}, got {got}"
        ) as caught:
            decode_mask(
                encode(np.ones(shape, bool)),
                size=(HEIGHT, WIDTH),
                turn=turn,
                orientation=orientation,
            )
        hint = f"; EXIF turns it ({turn}): the mask fits with orientation: {other}"
        assert str(caught.value).endswith(hint) == (got == "24x32")


def test_a_mask_whose_pixel_data_ends_early_is_refused():
    data = make_png([b"\xff"] * 4, bits=8, colour=0, width=1)
    start, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    short = data[:start] + make_chunk(b"IDAT", zlib.compress(b"\0\xff" * 3)) + data[end:]
    with pytest.raises(BadImageError, match="corrupt: PNG pixel data: 2 bytes are missing"):
        decode_mask(short, size=(4, 1))
