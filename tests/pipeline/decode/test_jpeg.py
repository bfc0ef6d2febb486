"""How many scans a JPEG has, whatever stands within it and behind it."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from pipeline.decode.images import MAX_JPEG_SCANS, BadImageError, decode_picture
from pipeline.decode.jpeg import count_scans

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (40, 56, 3), dtype=np.uint8)
SCANS = b"\xff\xda" * 5000  # as a film has them by chance
TAILS = {
    "a film of MBs": RNG.bytes(8_000_000),
    "scans": SCANS,
    "another picture": b"",  # set below
    "markers": b"\xff\xe1\xff\xff" + bytes(70_000) + SCANS,
    "zeros": bytes(10_000),
    "an animation's chunk": struct.pack(">I4s", 8, b"acTL") + bytes(12),
}


def encode(image_format="JPEG", pixels=RGB, **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, image_format, **options)
    return out.getvalue()


TAILS["another picture"] = encode(progressive=True) * 50


def decode(data, **options):
    return np.array(decode_picture(data, max_pixels=10_000_000, **options).image)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1),
        ({"quality": 100}, 1),
        ({"progressive": True}, 10),
        ({"restart_marker_blocks": 1}, 1),
        ({"restart_marker_rows": 1, "progressive": True}, 10),
    ],
)
def test_scans_of_whole_files(options, expected):
    """The pixels are noise, so that they hold bytes FF, which are stuffed."""
    pixels = RNG.integers(0, 256, (300, 300, 3), dtype=np.uint8)
    data = encode(pixels=pixels, **options)
    assert b"\xff\x00" in data
    assert count_scans(data) == expected == data.count(b"\xff\xda")


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_what_follows_a_picture_s_end_is_not_looked_at(image_format, tail):
    """A phone's motion photo is a JPEG with 2 to 10 MB of film behind it."""
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encode(image_format, **options)
    np.testing.assert_array_equal(decode(data + tail), decode(data))


def test_a_gain_map_behind_a_jpeg_of_several_pictures():
    """As "Ultra HDR" has it: the first picture is the one, and says where the map is."""
    several = io.BytesIO()
    pictures = [Image.fromarray(RGB), Image.fromarray(RGB[:, :, 0])]
    pictures[0].save(several, "MPO", save_all=True, append_images=pictures[1:])
    assert count_scans(several.getvalue()) == 1
    np.testing.assert_array_equal(decode(several.getvalue() + SCANS), decode(encode()))


@pytest.mark.parametrize("marker", [b"\xff\xe1", b"\xff\xe2", b"\xff\xed", b"\xff\xfe"])
def test_scans_of_a_thumbnail_are_not_the_picture_s(marker):
    data, thumbnail = encode(), b"Exif\0\0" + encode(pixels=RGB[:8, :8], progressive=True) * 60
    segment = marker + struct.pack(">H", 2 + len(thumbnail)) + thumbnail
    assert count_scans(data[:2] + segment + data[2:]) == 1
    np.testing.assert_array_equal(decode(data[:2] + segment + data[2:]), decode(data))


def make_bomb(*, between=b"", before=b""):
    """More scans than are allowed; ``between`` follows each, ``before`` stands before the first."""
    data = encode(progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + before + (data[last:-2] + between) * (MAX_JPEG_SCANS + 1) + data[-2:]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"between": b"\xff" * 100},  # fill bytes before a marker
        {"between": b"\xff\xd0\xff\xd7\xff\x00\xff\x01\xff\xff"},  # nothing with a length
        {"between": b"\xff\xfe\x00\x04ab"},  # comments
        {"before": b"\xff\x02\xff\xff"},  # reserved: no length, which would hide what follows
        {"before": b"\xff\xd3\xff\xff"},
        {"before": b"\xff\xfe\x00\x0e" + b"\xff\xd9" * 6},  # an end within a comment
    ],
)
def test_no_scan_can_be_hidden(options):
    bomb = make_bomb(**options)
    assert count_scans(bomb) > MAX_JPEG_SCANS
    with pytest.raises(BadImageError, match=r"expected at most 100 scans, got 1\d\d"):
        decode(bomb)


@pytest.mark.parametrize("end", [2, 3, 20, 300, -300, -2, -1])
def test_a_jpeg_cut_anywhere_has_no_more_scans(end):
    data = encode(progressive=True)
    assert count_scans(data[:end]) <= 10


def test_many_fill_bytes_take_no_longer_for_their_number():
    """Of 20 MB; a search that started again at each byte would not come to an end."""
    assert count_scans(b"\xff\xd8" + b"\xff" * 20_000_000 + b"\x00") == 0
