"""Decodes an image to RGB, by stated rules, and refuses what is damaged.

Only whole, still pictures in JPEG, PNG or WebP, told apart by their bytes and never by a name; the
number of pixels is checked in the header, before anything is decoded. The rules:

- grey: its value in each of R, G and B; 1 bit as 0 and 255; of 16 bits the high byte.
- palette: its colours. CMYK: Pillow's plain conversion.
- colour profiles: an embedded one is not applied, or with ``color: srgb`` converted to sRGB, before
  alpha is; gamma and other words about colour, in EXIF or a PNG's chunks, never are.
- alpha, in the pixels or the palette: composited over white. A PNG's one transparent colour (tRNS)
  becomes white, compared by its high byte in a PNG of 16 bits.
- orientation: applied, as EXIF (or, without one, XMP) gives it, and **masks are given in the
  oriented frame**; with ``orientation: ignore`` neither is turned.
- a JPEG that holds several pictures (MPO: stereo, previews, gain maps): the first.
- what follows a picture's own end (the film of a phone's "motion photo"): not looked at.

A PNG is checked beyond what Pillow does: the pixel data's checksums and length, and colours outside
the palette. Not every damage can be seen: a flipped bit in the pixels of a JPEG or WebP may decode,
and so may a JPEG that ends early but with an end marker.
"""

import io
import struct
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.base.orientation import turn_upright
from pipeline.corpus.members import MAX_METADATA_BYTES, Format
from pipeline.decode.color import flat_mode, read_profile
from pipeline.decode.jpeg import count_scans

Reason = Literal["corrupt", "too_large", "wrong_size", "empty"]
FORMATS: tuple[Format, ...] = ("JPEG", "PNG", "WEBP")
MAX_JPEG_SCANS = 100
"""Most scans of a JPEG: each costs a pass over all pixels, and progressive files use about 10."""
_PIECE_BYTES = 16 * 1024  # deflate makes at most 1032 times as much of it: 17 MB
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_ADAM7 = (  # left, top, step right, step down of each pass
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)

# Opened by class: Image.open has a pixel cap of its own, global to the process, and returns another
# class for a JPEG of several pictures.
_PLUGINS: dict[Format, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
}
_PILLOW_ERRORS = (  # what its plugins raise for damaged data
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError),
    *(struct.error, zlib.error),
)
_OTHER_FORMATS = {  # what crawls find in place of an image, by its first bytes in lower case
    b"gif8": "GIF",
    b"bm": "BMP",
    b"ii*\0": "TIFF",
    b"mm\0*": "TIFF",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cjxl ": "JPEG XL",
    b"\0\0\0\x0cjp  ": "JPEG 2000",
    b"<svg": "SVG",
    b"<?xml": "XML or SVG",
    b"%pdf": "PDF",
    b"\x1f\x8b": "gzip",
    b"pk\3\4": "zip",
    **dict.fromkeys((b"<!doctype html", b"<html", b"<head"), "HTML, a server's words"),
}


class BadImageError(ValueError):
    """An image or mask is rejected, with a ``reason`` and a line of ``detail``."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it survives pickling
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A decoded image in mode RGB, with what its file says of it.

    ``orientation``: EXIF's, 1 to 8, whether applied or not. ``color_profile``: the name of the
    embedded one, ``color.UNUSABLE`` if it cannot be applied, None if there is none.
    """

    image: Image.Image
    orientation: int
    color_profile: str | None


def decode_picture(
    data: bytes,
    *,
    max_pixels: int,
    max_metadata_bytes: int = MAX_METADATA_BYTES,
    on_size: Callable[[int, int], None] | None = None,
    orientation: Literal["apply", "ignore"] = "apply",
    color: Literal["raw", "srgb"] = "raw",
) -> Picture:
    """Decode one image to RGB.

    Args:
        max_pixels: largest width times height.
        max_metadata_bytes: most bytes of text, profiles and previews.
        on_size: called with width and height, not yet upright, before any pixel is decoded.
        orientation: "apply" turns the image upright, "ignore" leaves it as it is stored.
        color: "srgb" converts an embedded colour profile, "raw" leaves the values as they are.

    Raises:
        BadImageError: "too_large" for the pixel cap, "corrupt" for all else.
        RuntimeError: some library has turned on Pillow's ``LOAD_TRUNCATED_IMAGES``.
    """
    with refusing_damage():
        image = open_picture(data, FORMATS, max_metadata_bytes)
        _check_pixels(image, max_pixels)
        if on_size is not None:
            on_size(*image.size)
        load_pixels(image, data)
        turn = _read_orientation(image)
        applied = turn if orientation == "apply" else 1
        name, to_srgb = read_profile(image.info, image.mode, convert=color == "srgb")
        plain = image.mode == "RGB" and "transparency" not in image.info
        if not (plain and applied == 1 and to_srgb is None):
            pixels = turn_upright(_convert_to_rgb(image, data, to_srgb), applied)
            return Picture(Image.fromarray(pixels), turn, name)
        return Picture(image, turn, name)  # without a copy: 16 Mpx cost as much as decoding them


@contextmanager
def refusing_damage() -> Iterator[None]:
    """Turn what Pillow raises into a BadImageError."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError("too_large", f"Pillow's own cap: {error}") from error
    except BadImageError:
        raise
    except _PILLOW_ERRORS as error:
        raise BadImageError("corrupt", f"Pillow: {type(error).__name__}: {error}") from error


def _check_pixels(image: ImageFile.ImageFile, most: int) -> None:
    width, height = image.size
    if width * height > most:
        got = f"{width}x{height} = {width * height}"
        raise BadImageError("too_large", f"expected at most {most} pixels, got {got}")


def open_picture(
    data: bytes, formats: Collection[Format], max_metadata_bytes: int
) -> ImageFile.ImageFile:
    """Read and check the header: the format, the size, and that it is one still picture.

    Raises BadImageError "corrupt", or what ``refusing_damage`` turns into one.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        advice = "would read damage as zeros. Find the library that sets it and set it back."
        raise RuntimeError(f"PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on: it {advice}")
    name = sniff_format(data)
    if name is None or name not in formats:
        got = name or _describe_bytes(data)
        raise BadImageError("corrupt", f"expected {' or '.join(formats)}, got {got}")
    if name == "PNG":
        _check_png(data, max_metadata_bytes)
    elif name == "JPEG" and (num_scans := count_scans(data)) > MAX_JPEG_SCANS:
        detail = f"expected at most {MAX_JPEG_SCANS} scans, got {num_scans}"
        raise BadImageError("corrupt", detail)
    image = _PLUGINS[name](io.BytesIO(data))
    if (num_frames := getattr(image, "n_frames", 1)) > 1:
        raise BadImageError("corrupt", f"expected a still picture, got {num_frames} frames")
    blocks = [block for _, block in getattr(image, "applist", [])]  # JPEG's; WebP's are in info
    blocks = blocks or [value for value in image.info.values() if isinstance(value, bytes)]
    _check_metadata(sum(map(len, blocks)), max_metadata_bytes)
    return image


def sniff_format(data: bytes) -> Format | None:
    """Return the format that an image's first bytes say, None for none of the three."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def _describe_bytes(data: bytes) -> str:
    """Say what is there in place of a picture."""
    if data[4:8] == b"ftyp":  # ISO/IEC 14496-12: the brand follows
        brand = data[8:12]
        return "AVIF" if brand in (b"avif", b"avis") else f"HEIC or a film (brand {brand!r})"
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()  # a byte order mark may be first
    name = next((name for mark, name in _OTHER_FORMATS.items() if start.startswith(mark)), None)
    return name or (f"bytes {data[:8]!r}" if data else "no bytes")


def walk_png(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield every chunk's type and body up to IEND; each is whole and has the right CRC."""
    view = memoryview(data)
    start, kind = 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, start)  # struct.error: no IEND
        end = start + 12 + length
        if end > len(data):
            raise BadImageError("corrupt", f"PNG chunk {kind!r} at byte {start}: cut short")
        if zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            raise BadImageError("corrupt", f"PNG chunk {kind!r} at byte {start}: wrong checksum")
        yield kind, view[start + 8 : end - 4]
        start = end


def _check_png(data: bytes, max_metadata_bytes: int) -> None:
    """Check a PNG's checksums, one header and palette, no animation, and its metadata's size."""
    num_metadata_bytes = 0
    seen: set[bytes] = set()
    for kind, body in walk_png(data):
        if kind in (b"acTL", b"fcTL", b"fdAT"):
            raise BadImageError("corrupt", f"expected a still picture, got a PNG chunk {kind!r}")
        if not seen and (kind, len(body)) != (b"IHDR", 13):
            raise BadImageError("corrupt", f"expected a PNG's header first, got {kind!r}")
        if kind in seen and kind in (b"IHDR", b"PLTE"):  # Pillow would go by the last
            raise BadImageError("corrupt", f"expected one PNG chunk {kind!r}, got a second")
        if kind[0] & 0x20:  # ancillary: of no use to the pixels
            num_metadata_bytes += 12 + len(body)
        seen.add(kind)
    _check_metadata(num_metadata_bytes, max_metadata_bytes)


def load_pixels(image: ImageFile.ImageFile, data: bytes) -> None:
    """Decode the pixels, of a PNG only if all are there: Pillow would leave missing ones 0."""
    if image.format == "PNG":
        missing = _count_png_bytes(*struct.unpack_from(">IIBB", data, 16), interlaced=data[28] != 0)
        inflater = zlib.decompressobj()
        bodies = (body for kind, body in walk_png(data) if kind == b"IDAT")
        for body, start in ((b, start) for b in bodies for start in range(0, len(b), _PIECE_BYTES)):
            if missing <= 0 or inflater.eof:
                break
            missing -= len(inflater.decompress(body[start : start + _PIECE_BYTES]))
        if missing > 0:
            raise BadImageError("corrupt", f"PNG pixel data: {missing} bytes are missing")
    image.load()


def _count_png_bytes(width: int, height: int, bits: int, colour: int, *, interlaced: bool) -> int:
    """Return the bytes of the filtered pixels: PNG specification, third edition, 7.2 and 8.1."""
    bits_per_pixel = bits * _PNG_CHANNELS[colour]
    num_bytes = 0
    for left, top, step_x, step_y in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns = len(range(left, width, step_x))
        rows = len(range(top, height, step_y))
        num_bytes += rows * (1 + -(-columns * bits_per_pixel // 8)) if columns else 0
    return num_bytes


def _check_metadata(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        detail = f"expected at most {max_bytes} bytes of metadata, got {num_bytes}"
        raise BadImageError("corrupt", detail)


def _convert_to_rgb(
    image: ImageFile.ImageFile, data: bytes, to_srgb: ImageCms.ImageCmsTransform | None
) -> np.ndarray:
    """Return a loaded image as (H, W, 3) uint8, by the rules above but for the orientation."""
    if image.mode == "P":
        read_palette(np.asarray(image), data)
    key = None if image.mode == "P" else image.info.pop("transparency", None)
    if image.mode in ("LA", "RGBA") or (image.mode == "P" and "transparency" in image.info):
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        over_white = Image.alpha_composite(white, _convert_to_rgba(image, to_srgb))
        return np.array(over_white.convert("RGB"))
    colours: Image.Image = image
    if image.mode == "I;16":
        colours = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
    raw = rgb = np.array(colours.convert("RGB"))
    if to_srgb is not None:
        rgb = np.array(to_srgb.apply(colours.convert(flat_mode(image.mode))))
    if key is not None:  # only a PNG's tRNS, on grey or RGB pixels
        rgb[(raw == _scale_png_key(key, num_bits=data[24])).all(axis=2)] = 255
    return rgb


def _convert_to_rgba(
    image: ImageFile.ImageFile, to_srgb: ImageCms.ImageCmsTransform | None
) -> Image.Image:
    rgba = image.convert("RGBA")
    if to_srgb is None:
        return rgba
    converted = to_srgb.apply(rgba.convert(flat_mode(image.mode)))
    converted.putalpha(rgba.getchannel("A"))
    return converted


def read_palette(indices: np.ndarray, data: bytes) -> list[tuple[int, int, int]]:
    """Return a PNG's palette; refuse an index that it lacks, which Pillow would show as black."""
    palette = next((bytes(body) for kind, body in walk_png(data) if kind == b"PLTE"), b"")
    colours = list(zip(palette[::3], palette[1::3], palette[2::3], strict=False))
    if (largest := int(indices.max())) >= len(colours):
        detail = f"a pixel of colour {largest} in a palette of {len(colours)}"
        raise BadImageError("corrupt", detail)
    return colours


def read_values(image: ImageFile.ImageFile, data: bytes) -> np.ndarray:
    """Return a loaded PNG's grey values or palette indices as it stores them, uint8 or uint16."""
    values: np.ndarray = np.array(image, np.uint16 if image.mode == "I;16" else np.uint8)
    num_bits = data[24]
    if image.mode == "L" and num_bits < 8:
        values //= 255 // ((1 << num_bits) - 1)  # which Pillow has multiplied by it
    return values


def _scale_png_key(key: int | tuple[int, int, int], num_bits: int) -> np.ndarray:
    """Return a tRNS colour, in the PNG's own bits, as (3,) uint8, as its pixels are.

    PNG specification, third edition, 11.3.1.1. Pillow compares it unscaled below 8 bits.
    """
    most = (1 << num_bits) - 1
    values = np.broadcast_to(np.asarray(key), 3) & most
    return (values >> 8 if num_bits == 16 else values * 255 // most).astype(np.uint8)


def _read_orientation(image: ImageFile.ImageFile) -> int:
    """Return EXIF's orientation (EXIF 2.32, tag 0x0112), 1 for what is none of 1 to 8."""
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return next((turn for turn in range(1, 9) if turn == found), 1)


class Header(NamedTuple):
    """What an image's header says: ``size`` is the height and width as stored, before ``turn``."""

    format: Format
    size: tuple[int, int]
    turn: int  # EXIF's orientation, 1 to 8


def read_header(data: bytes, *, max_pixels: int) -> Header:
    """Read an image's format, size and orientation; of a PNG the pixels may be decoded for it.

    Raises:
        BadImageError: "too_large" for the pixel cap, "corrupt" for all else.
        RuntimeError: some library has turned on Pillow's ``LOAD_TRUNCATED_IMAGES``.
    """
    with refusing_damage():
        image = open_picture(data, FORMATS, MAX_METADATA_BYTES)
        _check_pixels(image, max_pixels)
        format_ = next(name for name in FORMATS if name == image.format)
        return Header(format_, image.size[::-1], _read_orientation(image))
