"""What a kind of dataset gives to the writer: recipes, one an image, that build samples.

A recipe holds what its annotations say in a few bytes, and reads the image and draws the masks when
it is asked to: so a listing of 10^6 images is small, and one image at a time is in memory.
"""

import errno
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

_PLAIN = re.compile(r"[A-Za-z0-9-]+(_[A-Za-z0-9-]+)*")
_MAX_CHARS = 71
_OF_ONE_FILE = (errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


class IngestError(ValueError):
    """An image or a phrase is left out: ``reason`` in one word with underscores, and a line."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True, eq=False)
class Phrase:
    """A phrase of an image.

    ``mask``: (H, W) bool of the image's pixels as they are stored, before EXIF's turn; None if the
    dataset has none; of an empty one the writer drops the phrase and counts it. ``ids``: what the
    source calls it (``task_id``, ``sent_id``), which goes into the JSON, in lists beside the
    phrases.
    """

    text: str
    mask: np.ndarray | None = None
    ids: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One image with what is known of it. Of its phrases either all have masks, or none has.

    ``image``: the file's bytes, JPEG, PNG or WebP, copied as they are. ``phrases``: none for an
    image alone. ``negatives``: phrases that the image does not have. ``ignore``: (H, W) bool as
    masks are, True where neither loss nor metrics count. ``ids``: of the image (``image_id``).
    ``rejects``: phrases that could not be had, as (phrase, reason, detail); the image is kept.
    """

    image: bytes
    phrases: tuple[Phrase, ...] = ()
    negatives: tuple[str, ...] = ()
    ignore: np.ndarray | None = None
    ids: Mapping[str, str | int] = field(default_factory=dict)
    rejects: tuple[tuple[str, str, str], ...] = ()


class Recipe(Protocol):
    """How one image's sample is made."""

    @property
    def key(self) -> str:
        """At most 80 letters, digits, - and _; distinct, the same at every run."""

    def build(self) -> Sample:
        """Read the image and draw the masks.

        Raises:
            IngestError: the image is left out; it becomes a line of the rejects.
            FileNotFoundError: its file is not there; the same.
        """


@dataclass(frozen=True, slots=True)
class Listing:
    """What a dataset's annotations hold, before any image is read.

    ``recipes``: in the order of the tars, the same at every run. ``split``: names the tars.
    ``published``: what the publishers count of this split, by ``images`` and ``pairs`` (and other
    words, such as ``refs``); empty where they publish none. ``listed``: the same as counted in the
    annotations. ``notes``: lines to print, such as what was left out by a rule, and how many.
    """

    recipes: Iterator[Recipe]
    split: str
    published: Mapping[str, int] = field(default_factory=dict)
    listed: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_image_file(path: Path) -> bytes:
    """Read an image's file; what is wrong with this one alone leaves its image out.

    Raises:
        IngestError: it is no regular file, a loop of links, or may not be read.
        FileNotFoundError: it is not there.
        OSError: the disk or the mount fails, which would leave out all images after it.
    """
    try:
        if path.exists() and not path.is_file():
            raise IngestError("not_a_file", f"{path}: expected a file with an image")
        return path.read_bytes()
    except OSError as error:
        if error.errno not in _OF_ONE_FILE:
            raise
        raise IngestError("unreadable_file", f"{path}: {error.strerror}") from error


def make_key(path: str, *, of: str, alone: bool = True) -> str:
    """Return a key for an image's path without extension, with ``__`` for a slash.

    Where that would not be plain (other characters than letters, digits, - and single _, over 71 of
    them, or not ``alone``: another image has the same path but for the extension), others become _
    and the first 8 digits of the SHA-256 of the whole path ``of`` follow, so that keys stay
    distinct.
    """
    parts = path.split("/")
    key = "__".join(parts)
    if alone and len(key) <= _MAX_CHARS and all(map(_PLAIN.fullmatch, parts)):
        return key
    digest = hashlib.sha256(of.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_-]", "_", key)[:_MAX_CHARS] + "-" + digest
