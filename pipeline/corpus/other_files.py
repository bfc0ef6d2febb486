"""Says what a file is that is named as a tar and is none, and what to do about it."""

import re

_DECOMPRESS = "Decompress the tar: only a plain one can be read at any place."
_UNPACK = "Unpack it, and write its files as a tar."
_CONVERT = "Write its images, phrases and masks as a tar."
_FETCH = "A download that fails leaves such a file in place of the tar: fetch it again."
_KINDS = (  # first bytes, what begins with them, what to do
    (b"\x1f\x8b", "gzip data", _DECOMPRESS),
    (b"\x1f\x9d", "data of compress", _DECOMPRESS),
    (b"BZh", "bzip2 data", _DECOMPRESS),
    (b"\xfd7zXZ\0", "xz data", _DECOMPRESS),
    (b"]\0\0", "lzma data", _DECOMPRESS),
    (b"LZIP", "lzip data", _DECOMPRESS),
    (b"\x28\xb5\x2f\xfd", "zstd data", _DECOMPRESS),
    (b"\x04\x22\x4d\x18", "lz4 data", _DECOMPRESS),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"PK\x05\x06", "an empty zip archive", _UNPACK),
    (b"PK\x07\x08", "one volume of a zip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (b"07070", "a cpio archive", _UNPACK),
    (b"!<arch>\n", "an ar archive", _UNPACK),
    (b"xar!", "a xar archive", _UNPACK),
    (b"hsqs", "a squashfs image", _UNPACK),
    (b"PAR1", "a Parquet file", _CONVERT),
    (b"ARROW1", "an Arrow file", _CONVERT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _CONVERT),
    (b"SQLite format 3\0", "an SQLite database", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"\xff\xd8\xff", "a JPEG picture", _CONVERT),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture", _CONVERT),
    (
        b"\0\x05\x16\x07",
        "macOS' attributes of another file (AppleDouble)",
        "Remove it, or give a pattern that leaves out names with '._' before them.",
    ),
)
_POINTERS = (  # what a text holds, what it is, what to do
    (
        re.compile(r"version https?://(git-lfs|git-media|hawser)\b"),
        "a Git LFS pointer",
        "Run `git lfs pull` in its repository.",
    ),
    (
        re.compile(r"\S*annex/objects/\S+"),
        "a git-annex pointer",
        "Run `git annex get` in its repository.",
    ),
    (
        re.compile(r"(outs|md5|deps):.*\b(md5|etag|path):"),
        "a DVC pointer",
        "Run `dvc pull` in its repository.",
    ),
    (re.compile(r"<!doctype html|<(html|head|body)\b", re.IGNORECASE), "an HTML page", _FETCH),
    (re.compile(r"<"), "XML or HTML", _FETCH),
    (re.compile(r'[{\[] ?["{\[}\]]'), "JSON", _FETCH),
)
_NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_MAX_SHOWN = 100  # characters of a text: a server's error code is among them


def describe_other_file(head: bytes) -> tuple[str, str] | None:
    """Return what begins with ``head`` and what to do about it; None for what is not known."""
    for magic, name, advice in _KINDS:
        if head.startswith(magic):
            return name, advice
    text = head.decode("utf-8", "replace").lstrip("\ufeff")
    if not text or _NO_TEXT.search(text) or 4 * text.count("\ufffd") > len(text):
        return None
    line = " ".join(text.split())
    shown = repr(line if len(line) <= _MAX_SHOWN else f"{line[: _MAX_SHOWN - 1]}…")
    for pattern, name, advice in _POINTERS:
        if pattern.match(line):
            return (name if "pointer" in name else f"{name}: {shown}"), advice
    return f"a text: {shown}", _FETCH
