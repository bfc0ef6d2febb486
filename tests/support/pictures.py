"""Encoded pictures, also PNGs of the bit depths and chunks that Pillow does not write."""

import io
import struct
import zlib

from PIL import Image


def encode(pixels, image_format="PNG", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def make_chunk(kind, body=b""):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def make_png(rows, *, bits, colour, width, before=b"", after=b""):
    """A PNG of raw rows; Pillow cannot write every bit depth."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + make_chunk(b"IHDR", header)
        + before
        + make_chunk(b"IDAT", pixels)
        + after
        + make_chunk(b"IEND")
    )
