"""Says what a file is that is named as a tar and is none, and what to do about it."""

import re

_DECOMPRESS = "Decompress the tar: only a plain one can be read at any place."
_UNPACK = "Unpack it, and write its files as a tar."
_FETCH = "A download that fails leaves such a file in place of the tar: fetch it again."
_KINDS = (  # first bytes, what begins with them, what to do
    (b"\x1f\x8b", "gzip data", _DECOMPRESS),
    (b"BZh", "bzip2 data", _DECOMPRESS),
    (b"\xfd7zXZ\0", "xz data", _DECOMPRESS),
    (b"\x28\xb5\x2f\xfd", "zstd data", _DECOMPRESS),
    (b"\x04\x22\x4d\x18", "lz4 data", _DECOMPRESS),
    (b"\x5d\0\0\x80\0", "lzma data", _DECOMPRESS),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"PK\x05\x06", "an empty zip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (b"PAR1", "a Parquet file", "Write its images, phrases and masks as a tar."),
    (b"\0\x05\x16\x07", "macOS' attributes of another file ('._…')", "Remove it."),
)
_TEXTS = (  # what a text holds, what it is, what to do
    (
        r"version https?://git-lfs\b",
        "a Git LFS pointer",
        "Run `git lfs pull` in its repository.",
    ),
    (r"\S*annex/objects/\S", "a git-annex pointer", "Run `git annex get` in its repository."),
    (r"(outs|md5|deps):.*\b(md5|etag|path):", "a DVC pointer", "Run `dvc pull` in its repository."),
    (r"(?i)<!doctype html|<(html|head|body)\b", "an HTML page: {}", _FETCH),
    (r"<", "XML or HTML: {}", _FETCH),
    (r"", "a text: {}", _FETCH),
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
    return next(
        (name.format(shown), advice) for start, name, advice in _TEXTS if re.match(start, line)
    )
