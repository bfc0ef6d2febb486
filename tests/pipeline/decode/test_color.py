"""Colour profiles: named, converted by their formulas, and never a reason to lose an image."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.decode.color import MAX_PROFILE_NAME, UNUSABLE
from pipeline.decode.images import decode_picture
from tests.support.icc import SRGB_PRIMARIES, WIDE_PRIMARIES, make_profile

RGB = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
GREY = RGB[..., 0]
WIDE, SOFT = make_profile(), make_profile("GRAY", gamma=1.8, name="soft grey")
CMYK = make_profile("CMYK", name="inks", kind="prtr")


def encode(pixels, profile, image_format="PNG", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    image.save(out, image_format, icc_profile=profile, **options)
    return out.getvalue()


def decode(data, color="srgb"):
    picture = decode_picture(data, max_pixels=10_000, color=color)
    return np.array(picture.image), picture.color_profile


def encode_srgb(linear):
    """IEC 61966-2-1: sRGB's curve, from light in [0, 1] to 0-255."""
    light = np.clip(linear, 0, 1)
    low, high = 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055
    return 255 * np.where(light <= 0.0031308, low, high)


def from_wide(rgb):
    """What ``WIDE`` says of the values: its gamma, its primaries, then sRGB's."""
    xyz = (rgb / 255) ** 2.2 @ np.array(WIDE_PRIMARIES)
    return encode_srgb(xyz @ np.linalg.inv(SRGB_PRIMARIES))


def near(found, expected):
    """Little CMS computes in 8 bits: dark values, where sRGB's curve is steep, are off by some."""
    return np.abs(found - expected).max() <= 3


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100, "subsampling": 0})],
)
def test_an_rgb_profile_is_converted_and_raw_is_what_it_was(image_format, options):
    y, x = np.mgrid[:24, :32]
    smooth = np.stack([y * 10, x * 8, 255 - y * 5], axis=2).astype(np.uint8)
    data, plain = (encode(smooth, p, image_format, **options) for p in (WIDE, None))
    raw, name = decode(data, "raw")
    assert name == "wide"
    np.testing.assert_array_equal(raw, decode(plain)[0])
    assert decode(plain)[1] is None
    found, name = decode(data)
    assert name == "wide"
    assert near(found, from_wide(raw))
    assert np.abs(found.astype(int) - raw).max() > 40


def test_grey_of_every_depth():
    deep = np.random.default_rng(1).integers(0, 65536, (24, 32), dtype=np.uint16)
    with_alpha = Image.fromarray(np.stack([GREY, np.full_like(GREY, 255)], axis=2), "LA")
    bits = GREY > 100
    for pixels, values in [(GREY, GREY), (deep, deep >> 8), (with_alpha, GREY), (bits, bits * 255)]:
        found, name = decode(encode(pixels, SOFT))
        assert name == "soft grey"
        assert near(found, encode_srgb((values / 255) ** 1.8)[..., None])


def test_cmyk_by_its_table():
    """Of no ink, of black, and of each other ink: the table's corners, without colour."""
    inks = np.zeros((40, 40, 4), np.uint8)
    inks[:, 8:16, 3] = 255
    for ink in range(3):
        inks[:, 16 + 8 * ink : 24 + 8 * ink, ink] = 255
    data = encode(Image.fromarray(inks, "CMYK"), CMYK, "JPEG", quality=100)
    found, name = decode(data)
    assert name == "inks"
    lightness = np.array([255, 0, 195, 195, 195]) / 255 * 100
    light = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)  # CIE 1976
    assert near(found[20, 4::8], encode_srgb(light)[:, None])
    assert not near(decode(data, "raw")[0][20, 4::8], encode_srgb(light)[:, None])


def test_colours_are_converted_before_alpha_lays_them_over_white():
    alpha = np.zeros((24, 32, 1), np.uint8)
    alpha[:, 8:16], alpha[:, 16:] = 128, 255
    found, _ = decode(encode(np.concatenate([RGB, alpha], axis=2), WIDE))
    share = alpha / 255
    assert near(found, from_wide(RGB) * share + 255 * (1 - share))
    palette = Image.fromarray(GREY % 2).convert("P")
    palette.putpalette([10, 200, 30, 90, 60, 70])
    found, _ = decode(encode(palette, WIDE, transparency=1))
    colours = np.array([from_wide(np.array([10, 200, 30])), [255] * 3])
    assert near(found, colours[GREY % 2])


def test_a_png_s_transparent_colour_is_found_before_the_conversion():
    pixels = RGB.copy()
    pixels[3, 5] = 10, 200, 30
    found, _ = decode(encode(pixels, WIDE, transparency=(10, 200, 30)))
    assert found[3, 5].tolist() == [255, 255, 255]
    assert near(found[4:], from_wide(pixels[4:]))


def test_a_profile_that_a_file_holds_in_part_is_told_as_unusable():
    """Of a JPEG's pieces one is missing; a PNG's is no deflate data. Pillow gives None for both."""
    long = WIDE + bytes(70_000)
    jpeg = encode(RGB, long, "JPEG")
    second = jpeg.index(b"ICC_PROFILE\0\2")
    png = encode(RGB, WIDE)
    for data in (
        jpeg[: second - 4] + jpeg[second - 2 + int.from_bytes(jpeg[second - 2 : second]) :],
        spoil(png, b"iCCP"),
    ):
        assert decode(data, "raw")[1] == decode(data)[1] == UNUSABLE


def spoil(png, kind):
    """A PNG of which a chunk's last bytes are zeros, with its checksum right."""
    at = png.index(kind)
    (num,) = struct.unpack_from(">I", png, at - 4)
    chunk = png[at : at + 4 + 20] + bytes(num - 20)
    return png[:at] + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[at + 8 + num :]


def drop_curves(profile):
    return profile.replace(b"TRC", b"xxx")


@pytest.mark.parametrize(
    ("pixels", "profile"),
    [
        (RGB, b"no profile at all"),
        (RGB, WIDE[:100]),
        (RGB, WIDE[:128] + b"\xff\xff\xff\xff" + WIDE[132:]),  # as many tags
        (RGB, SOFT),
        (GREY, WIDE),
        (RGB, make_profile(kind="link")),
        (RGB, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
    ],
)
def test_what_cannot_be_applied_is_no_profile(pixels, profile):
    plain, _ = decode(encode(pixels, None))
    for color in ("raw", "srgb"):
        found, name = decode(encode(pixels, profile), color)
        assert name == UNUSABLE
        np.testing.assert_array_equal(found, plain)


def test_a_profile_that_lacks_its_curves_is_found_when_it_is_converted():
    found, name = decode(encode(RGB, drop_curves(WIDE)))
    assert name == UNUSABLE
    np.testing.assert_array_equal(found, RGB)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Rot\nund\x1b[31m", "Rot und [31m"), ("x" * 5000, "x" * MAX_PROFILE_NAME), ("", "unnamed")],
)
def test_a_name_is_one_printable_line_of_bounded_length(name, expected):
    assert decode(encode(RGB, make_profile(name=name)), "raw")[1] == expected


def test_cut_anywhere_a_profile_is_converted_or_not_and_no_more():
    for end in range(0, len(WIDE), 7):
        found, name = decode(encode(RGB, WIDE[:end]))
        same = np.array_equal(found, RGB)
        assert same == (name in (None, UNUSABLE)), (end, name)
