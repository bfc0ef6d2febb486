"""Images: every conversion rule against its formula, and what must be refused."""

import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from pipeline.decode.images import (
    MAX_JPEG_SCANS,
    BadImageError,
    decode_picture,
)
from tests.support.pictures import encode, make_chunk, make_png

HEIGHT, WIDTH = 24, 32
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = RGB[:, :, 0]
ORIENTATION = 0x0112


def decode(data, **options):
    return np.array(decode_picture(data, **{"max_pixels": 10_000, **options}).image)


def three(grey):
    return np.repeat(np.asarray(grey, dtype=np.uint8)[:, :, None], 3, axis=2)


def test_rgb_is_exact_writable_and_contiguous():
    image = decode(encode(RGB))
    np.testing.assert_array_equal(image, RGB)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert image.flags.c_contiguous


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("JPEG", {"quality": 95}), ("JPEG", {"progressive": True}), ("WEBP", {"quality": 95})],
)
def test_lossy_formats_are_close(image_format, options):
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    smooth = np.stack([y * 8, x * 6, y + x], axis=2).astype(np.uint8)
    image = decode(encode(smooth, image_format, **options))
    assert np.abs(image.astype(int) - smooth).mean() < 6


def test_lossless_webp_is_exact():
    np.testing.assert_array_equal(decode(encode(RGB, "WEBP", lossless=True)), RGB)


def test_grey_one_bit_and_sixteen_bits():
    np.testing.assert_array_equal(decode(encode(GREY)), three(GREY))
    bits = GREY > 100
    np.testing.assert_array_equal(decode(encode(bits)), three(bits * 255))
    deep = RNG.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
    np.testing.assert_array_equal(decode(encode(deep)), three(deep >> 8))


def test_sixteen_bit_rgb_keeps_the_high_byte():
    data = make_png([b"\x12\xff\x34\x00\x56\x80"], bits=16, colour=2, width=1)
    assert decode(data).tolist() == [[[0x12, 0x34, 0x56]]]


def test_palette_with_and_without_transparency():
    image = Image.fromarray(GREY % 4).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 200, 210, 220])
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [200, 210, 220]], np.uint8)
    np.testing.assert_array_equal(decode(encode(image)), colours[GREY % 4])
    colours[2] = 255
    np.testing.assert_array_equal(decode(encode(image, transparency=2)), colours[GREY % 4])


def test_cmyk():
    cmyk = Image.fromarray(RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8), "CMYK")
    smooth = cmyk.resize((64, 64), Image.Resampling.BICUBIC)
    inverse = 255 - np.asarray(smooth).astype(int)
    expected = inverse[:, :, :3] * inverse[:, :, 3:] / 255
    assert np.abs(decode(encode(smooth, "JPEG", quality=98)) - expected).mean() < 4


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_alpha_is_composited_over_white(image_format):
    alpha = RNG.integers(1, 256, (HEIGHT, WIDTH, 1), dtype=np.uint8)
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    image = decode(encode(np.concatenate([RGB, alpha], axis=2), image_format, **options))
    share = alpha / 255
    expected = RGB * share + 255 * (1 - share)
    np.testing.assert_allclose(image.astype(float), expected, atol=1)


def test_grey_with_alpha():
    pixels = np.array([[[0, 255], [0, 0], [100, 255]]], dtype=np.uint8)
    image = decode(encode(Image.fromarray(pixels, "LA")))
    assert image[0, :, 0].tolist() == [0, 255, 100]


@pytest.mark.parametrize(
    ("row", "bits", "colour", "key", "expected"),
    [
        (b"\x40", 1, 0, b"\0\1", [0, 255]),
        (b"\x40", 1, 0, b"\0\0", [255, 255]),
        (b"\x60", 2, 0, b"\0\1", [255, 170]),
        (b"\x5a", 4, 0, b"\0\5", [255, 170]),
        (b"\x05\xaa", 8, 0, b"\0\5", [255, 170]),
        (b"\x05\x00\xaa\x00", 16, 0, b"\5\0", [255, 170]),
        (b"\5\5\5\6\6\6", 8, 2, b"\0\5\0\5\0\5", [255, 6]),
        (b"\5\0\5\0\5\0\6\0\6\0\6\0", 16, 2, b"\5\0\5\0\5\0", [255, 6]),
    ],
)
def test_a_png_s_transparent_colour_becomes_white(row, bits, colour, key, expected):
    data = make_png([row], bits=bits, colour=colour, width=2, before=make_chunk(b"tRNS", key))
    assert decode(data)[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(image_format, orientation):
    turns = [
        lambda a: a,
        lambda a: a[:, ::-1],
        lambda a: np.rot90(a, 2),
        lambda a: a[::-1],
        lambda a: a.swapaxes(0, 1),
        lambda a: np.rot90(a, -1),
        lambda a: np.rot90(a, 2).swapaxes(0, 1),
        lambda a: np.rot90(a),
    ]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {}
    plain = decode(encode(RGB, image_format, **options))
    data = encode(RGB, image_format, exif=exif, **options)
    image = decode(data)
    np.testing.assert_array_equal(image, turns[orientation - 1](plain))
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(decode(data, orientation="ignore"), plain)
    for choice in ("apply", "ignore"):
        picture = decode_picture(data, max_pixels=10_000, orientation=choice)
        assert picture.orientation == orientation  # told in either case


def test_an_orientation_out_of_range_turns_nothing():
    exif = Image.Exif()
    exif[ORIENTATION] = 9
    np.testing.assert_array_equal(decode(encode(RGB, exif=exif)), RGB)
    assert decode_picture(encode(RGB, exif=exif), max_pixels=10_000).orientation == 1


def test_the_first_picture_of_a_jpeg_of_several():
    pictures = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    several = encode(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    np.testing.assert_array_equal(decode(several), decode(encode(RGB, "JPEG")))


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_the_pixel_cap_holds_to_the_pixel(image_format):
    data = encode(RGB, image_format)
    assert decode(data, max_pixels=HEIGHT * WIDTH).shape == RGB.shape
    with pytest.raises(BadImageError, match="too_large: expected at most 767 pixels, got 32x24"):
        decode(data, max_pixels=HEIGHT * WIDTH - 1)


@pytest.mark.parametrize("side", [10_000, 16_383])
def test_a_pixel_bomb_is_refused_from_its_header(side):
    size = struct.pack("<HH", side, side)
    frame = b"\x10\x00\x00\x9d\x01\x2a" + size + bytes(50)
    chunk = b"VP8 " + struct.pack("<I", len(frame)) + frame
    webp = b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk
    png = make_png([b""], bits=8, colour=2, width=side)
    png = png[:20] + struct.pack(">I", side) + png[24:]
    png = png[:29] + struct.pack(">I", zlib.crc32(png[12:29])) + png[33:]
    for data in (webp, png):
        with pytest.raises(BadImageError, match="too_large"):
            decode(data, max_pixels=64_000_000)


@pytest.mark.parametrize("side", [9_000, 65_535])
def test_a_webp_whose_canvas_is_a_bomb_is_refused_from_its_header(side):
    """The picture within is small: the canvas alone is what would be allocated."""
    size = struct.pack("<I", side - 1)[:3]
    canvas = b"VP8X" + struct.pack("<II", 10, 0) + size * 2
    body = b"WEBP" + canvas + encode(RGB, "WEBP", lossless=True)[12:]
    with pytest.raises(BadImageError, match=r"too_large|could not create decoder"):
        decode(b"RIFF" + struct.pack("<I", len(body)) + body, max_pixels=64_000_000)


def test_the_size_is_told_before_a_pixel_is_decoded():
    told = []
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    decode_picture(
        encode(RGB, exif=exif), max_pixels=10_000, on_size=lambda *size: told.append(size)
    )
    assert told == [(WIDTH, HEIGHT)]
    with pytest.raises(BadImageError, match="corrupt"):
        decode_picture(
            encode(RGB, "JPEG")[:-20], max_pixels=10_000, on_size=lambda *size: told.append(size)
        )
    with pytest.raises(BadImageError, match="too_large"):
        decode_picture(encode(RGB), max_pixels=9, on_size=lambda *size: told.append(size))
    assert told == [(WIDTH, HEIGHT)] * 2


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_cut_anywhere_it_is_refused_or_unchanged(image_format):
    data = encode(RGB, image_format)
    whole = decode(data)
    for end in range(len(data)):
        try:
            image = decode(data[:end])
        except BadImageError:
            continue
        np.testing.assert_array_equal(image, whole)  # a JPEG without its end marker
        assert (image_format, end) in [("JPEG", len(data) - 2), ("JPEG", len(data) - 1)]


def test_any_flipped_byte_of_a_png_is_refused():
    data = encode(RGB[:5, :5])
    for at in range(len(data)):
        damaged = data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]
        with pytest.raises(BadImageError, match=r"corrupt|too_large"):
            decode(damaged)


@pytest.mark.parametrize(
    ("data", "got"),
    [
        *((encode(RGB, name), name) for name in ("GIF", "BMP", "TIFF", "AVIF", "PDF")),
        (encode(RGB, "JPEG2000"), "JPEG 2000"),
        (b"", "no bytes"),
        (b"\n<!DOCTYPE html><html>404</html>", "HTML, a server"),
        (b'\xef\xbb\xbf<?xml version="1.0"?><svg/>', "XML or SVG"),
        (b"\0\0\0\x18ftypheic", r"HEIC or a film \(brand b'heic'\)"),
        (b'{"error": 404}', r"""bytes b'{"error"'"""),
        (b"RIFF\0\0\0\0AVI ", "bytes b'RIFF"),
    ],
)
def test_what_is_no_picture_is_refused_by_what_it_is(data, got):
    with pytest.raises(BadImageError, match=f"corrupt: expected JPEG or PNG or WEBP, got {got}"):
        decode(data)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_animations_are_refused(image_format):
    other = Image.fromarray(255 - RGB)
    data = encode(RGB, image_format, save_all=True, append_images=[other])
    with pytest.raises(
        BadImageError, match=r"expected a still picture, got (2 frames|a PNG chunk b'acTL')"
    ):
        decode(data)


def test_a_png_with_two_headers_or_palettes_or_none_first_is_refused():
    rows = {"bits": 8, "colour": 0, "width": 2}
    header = make_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 9, 8, 0, 0, 0, 0))
    palette = make_chunk(b"PLTE", b"abc")
    for before, message in [
        (header, "expected one PNG chunk b'IHDR', got a second"),
        (palette * 2, "expected one PNG chunk b'PLTE', got a second"),
        (make_chunk(b"fcTL", bytes(26)), "expected a still picture, got a PNG chunk b'fcTL'"),
    ]:
        with pytest.raises(BadImageError, match=message):
            decode(make_png([b"ab"], before=before, **rows))
    data = make_png([b"ab"], **rows)
    with pytest.raises(BadImageError, match="expected a PNG's header first, got b'PLTE'"):
        decode(data[:8] + palette + data[8:])


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_metadata_is_capped(image_format):
    data = encode(RGB, image_format, icc_profile=RNG.bytes(5000))
    assert decode(data).shape == RGB.shape
    with pytest.raises(BadImageError, match="expected at most 1000 bytes of metadata, got"):
        decode(data, max_metadata_bytes=1000)


def test_metadata_that_pillow_does_not_know_is_capped():
    jpeg = encode(RGB, "JPEG")
    jpeg = jpeg[:2] + b"\xff\xe5" + struct.pack(">H", 2002) + bytes(2000) + jpeg[2:]
    png = make_png([b"ab"], bits=8, colour=0, width=2, after=make_chunk(b"prVt", bytes(2000)))
    for data in (jpeg, png):
        assert decode(data, max_metadata_bytes=3000).ndim == 3
        with pytest.raises(BadImageError, match="expected at most 1000 bytes of metadata, got"):
            decode(data, max_metadata_bytes=1000)


def test_a_text_bomb_is_refused():
    text = PngInfo()
    text.add_text("a", "x" * (2 << 20), zip=True)
    with pytest.raises(BadImageError, match="corrupt: Pillow: ValueError: Decompressed data too"):
        decode(encode(RGB, pnginfo=text))


def test_a_jpeg_of_endless_scans_is_refused():
    data = encode(RGB, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:-2] + data[last:-2] * MAX_JPEG_SCANS + b"\xff\xd9"
    with pytest.raises(BadImageError, match="expected at most 100 scans, got 1"):
        decode(bomb)


def test_pillow_s_tolerance_of_truncation_is_not_tolerated(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES is on"):
        decode(encode(RGB))


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize(("bits", "colour"), [(1, 0), (4, 0), (8, 0), (16, 0), (8, 2), (8, 6)])
def test_pixel_data_that_ends_early_is_refused(bits, colour, interlace):
    """Pillow leaves such rows 0, which in a mask is background."""
    row_bytes = -(-5 * bits * {0: 1, 2: 3, 6: 4}[colour] // 8)
    num_bytes = 5 * (1 + row_bytes)
    if interlace:  # the passes of 5x5: 1x1, 1x1, 2x1, 1x2, 3x1, 2x3, 5x2
        sizes = [(1, 1), (1, 1), (2, 1), (1, 2), (3, 1), (2, 3), (5, 2)]
        pixel_bits = bits * {0: 1, 2: 3, 6: 4}[colour]
        num_bytes = sum(rows * (1 + -(-columns * pixel_bits // 8)) for columns, rows in sizes)
    header = struct.pack(">IIBBBBB", 5, 5, bits, colour, 0, 0, interlace)
    start = b"\x89PNG\r\n\x1a\n" + make_chunk(b"IHDR", header)

    def build(length):
        stream = zlib.compress(bytes(length))
        parts = make_chunk(b"IDAT", stream[:7]) + make_chunk(b"IDAT", stream[7:])
        return start + parts + make_chunk(b"IEND")

    assert decode(build(num_bytes)).shape == (5, 5, 3)
    with pytest.raises(BadImageError, match="corrupt: PNG pixel data: 1 bytes are missing"):
        decode(build(num_bytes - 1))


@pytest.mark.parametrize(("colours", "found"), [(b"abcabc", "2"), (b"", "0")])
def test_a_colour_outside_the_palette_is_refused(colours, found):
    palette = make_chunk(b"PLTE", colours) if colours else b""
    data = make_png([b"\1\2"], bits=8, colour=3, width=2, before=palette)
    with pytest.raises(BadImageError, match=f"a pixel of colour 2 in a palette of {found}"):
        decode(data)


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(BadImageError("empty", "x")))
    assert (error.reason, error.detail, str(error)) == ("empty", "x", "empty: x")
