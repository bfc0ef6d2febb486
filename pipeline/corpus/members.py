"""Groups a tar's members into samples by their names, and rejects what fits none, with a reason.

A sample is the members ``KEY.jpg`` (or jpeg, png, webp), ``KEY.json`` (``{"phrases": [...]}``) and
``KEY.mask0.png`` ... with one mask for each phrase, in order. KEY is WebDataset's: the path up to
the first dot of its last part ("a/b.mask0.png" has the key "a/b"). Extensions may be in any case.
The members of a key may stand anywhere in the tar, and are of one key if their names look alike:
"é" is one character on Linux and two on a Mac (Unicode's NFC and NFD).

Every member that is no directory belongs to exactly one sample or reject, so that their members
add up to the tar's. A member with another extension (``.pkl``, ``.npy``) is rejected alone.
"""

import enum
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from pipeline.corpus.phrases import UNPRINTABLE
from pipeline.corpus.tar import Member

Format = Literal["JPEG", "PNG", "WEBP"]
MAX_METADATA_BYTES = 16 * 1024 * 1024  # a phone's gain map or preview takes 1 to 6 MB
MAX_NAME_BYTES = 255
_MAX_SHOWN = 1500  # characters of a reject's name or detail: a key and a phrase fit
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)", re.DOTALL)
IMAGE_FORMATS: dict[str, Format] = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
_MASK = re.compile(r"mask(0|[1-9][0-9]{0,4})\.png")
_LIKE_A_SAMPLE = re.compile(
    r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif|hei[cf]|jp2|json|tar(\.\w+)?|tgz|zip)\Z", re.IGNORECASE
)


class RejectReason(enum.StrEnum):
    """Why something was rejected, as in ``rejects.parquet``."""

    UNSAFE_NAME = "unsafe_name"  # absolute, "..", control characters, no UTF-8, over 255 bytes
    NOT_A_FILE = "not_a_file"  # a link, a device, a FIFO or an unknown kind of member
    UNEXPECTED_MEMBER = "unexpected_member"  # no image, text or mask by its name
    DUPLICATE_MEMBER = "duplicate_member"  # a member, the text or a mask is there twice
    SEVERAL_IMAGES = "several_images"  # more than one image for a key
    NO_IMAGE = "no_image"  # no image for a key
    NO_TEXT = "no_text"  # no JSON for a key
    MEMBER_TOO_LARGE = "member_too_large"  # over Limits.max_member_bytes
    BAD_TEXT = "bad_text"  # no UTF-8, no JSON, too large or deep, or its phrases break a rule
    BAD_IMAGE = "bad_image"  # damaged, animated, or none of JPEG, PNG and WebP
    IMAGE_TOO_LARGE = "image_too_large"  # over Limits.max_pixels
    MISSING_MASK = "missing_mask"  # a phrase has no mask
    BAD_MASK = "bad_mask"  # damaged, RGB, of more than two classes, or more masks than phrases
    MASK_SIZE = "mask_size"  # not of the image's size
    MASKS_TOO_LARGE = "masks_too_large"  # together over Limits.max_mask_pixels
    EMPTY_MASK = "empty_mask"  # without foreground
    DECODER_CRASHED = "decoder_crashed"  # died twice, by a signal or over its memory bound
    DECODER_TIMEOUT = "decoder_timeout"  # came to no end in its time, twice
    OUTSIDE_VIEW = "outside_view"  # a mask of which a view's crop has nothing
    TOO_THIN = "too_thin"  # a mask in the crop, but between the pixels of a view of its size


FORMER_REASONS = ("not_adjacent",)  # in stores that earlier versions have written


@dataclass(frozen=True, slots=True)
class Reject:
    """One rejected sample, member, or pair of a sample that is kept.

    ``name`` is the sample's key or the member's name, for a pair the key and, after ": ", its
    ``phrase``; ``detail`` is a line. All are printable and valid UTF-8. ``num_members`` is how many
    of the tar's members it accounts for: 0 for a pair.
    """

    name: str
    level: Literal["sample", "member", "pair"]
    reason: RejectReason
    detail: str
    num_members: int = 1
    phrase: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _printable(self.name))
        object.__setattr__(self, "detail", _printable(self.detail))
        if self.level == "pair":
            object.__setattr__(self, "num_members", 0)

    @property
    def key(self) -> str:
        """The sample's key, or the member's name."""
        return self.name if self.phrase is None else self.name.removesuffix(f": {self.phrase}")


@dataclass(frozen=True, slots=True)
class SampleMembers:
    """The members of one sample, complete by their names; ``masks`` are in order from mask0.

    ``key`` is spelt as the image's name spells it.
    """

    key: str
    image: Member
    text: Member
    masks: tuple[Member, ...]

    @property
    def members(self) -> tuple[Member, ...]:
        """All members, the image first."""
        return (self.image, self.text, *self.masks)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one sample, each at least 1; what exceeds them is rejected."""

    max_member_bytes: int = 256 * 1024 * 1024  # of any member; bounds the memory of a read
    max_pixels: int = 64_000_000  # of the image, by its header; 192 MB as RGB, a large camera's
    max_mask_pixels: int = 1_000_000_000  # of all masks together, a byte each
    max_metadata_bytes: int = MAX_METADATA_BYTES  # text, profiles and previews of an image
    max_text_bytes: int = 1024 * 1024  # of the JSON
    max_phrases: int = 1000  # PhraseCut's images have below 50
    max_phrase_chars: int = 1000  # of one phrase; a text encoder reads 77 tokens

    def __post_init__(self) -> None:
        for limit in fields(self):
            if (value := getattr(self, limit.name)) < 1:
                raise ValueError(f"Limits.{limit.name}: must be at least 1, but got {value}")


class RejectedError(ValueError):
    """A sample or member is rejected, with a ``reason`` and a line of ``detail``."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class _Named(NamedTuple):
    """A member, and its name taken apart: the key as it is spelt, the extension in lower case."""

    key: str
    extension: str
    member: Member


def group_members(members: Sequence[Member]) -> tuple[list[SampleMembers], list[Reject]]:
    """Group all of a tar's members, in any order, into samples and rejects.

    Samples and rejects are in the order of their first members. Nothing is read. Where no member
    fits, those that a sample may have been meant by are rejected as samples, so that the tar does
    not count as one without any.
    """
    refused: list[tuple[Member, RejectedError]] = []
    groups: dict[str, list[_Named]] = {}  # by the key in NFC
    for member in members:
        if member.kind == "directory":
            continue
        try:
            named = _classify(member)
        except RejectedError as error:
            refused.append((member, error))
            continue
        groups.setdefault(unicodedata.normalize("NFC", named.key), []).append(named)
    samples: list[SampleMembers] = []
    rejects = _reject_refused(refused, is_all=not groups)
    for group in groups.values():
        try:
            samples.append(_assemble(group))
        except RejectedError as error:
            key = group[0].key
            rejects.append(Reject(key, "sample", error.reason, error.detail, len(group)))
    return samples, rejects


def _reject_refused(
    refused: Sequence[tuple[Member, RejectedError]], *, is_all: bool
) -> list[Reject]:
    """Reject members one by one; where they are all of a tar, by the keys of what they seem."""
    rejects: list[Reject] = []
    meant: dict[str, list[tuple[Member, RejectedError]]] = {}
    for member, error in refused:
        if is_all and (key := _find_meant(member)):
            meant.setdefault(key, []).append((member, error))
        else:
            rejects.append(Reject(member.name, "member", error.reason, error.detail))
    for key, group in meant.items():
        error = group[0][1]
        rejects.append(Reject(key, "sample", error.reason, error.detail, len(group)))
    return rejects


def _find_meant(member: Member) -> str | None:
    """Return the key of the sample that a refused member may have been meant for, if any.

    A link may be a sample's or a folder's of samples, and a tar may hold samples. What is hidden,
    such as a Mac's ``._a.jpg``, is none.
    """
    name = UNPRINTABLE.sub("", member.name)
    last = name.rpartition("/")[2]
    if last.startswith("."):
        return None
    if member.kind != "file" or _LIKE_A_SAMPLE.search(last):
        return name.removesuffix(last) + last.partition(".")[0]
    return None


def _classify(member: Member) -> _Named:
    """Take a member's name apart; its extension is one of those of a sample."""
    if problem := _find_unsafe(member.name):
        raise RejectedError(RejectReason.UNSAFE_NAME, problem)
    if member.kind != "file":
        raise RejectedError(RejectReason.NOT_A_FILE, f"expected a file, got a {member.kind}")
    match = _KEY_AND_EXTENSION.fullmatch(member.name)
    extension = match[2].lower() if match else ""
    if not match or not (
        extension in IMAGE_FORMATS or extension == "json" or _MASK.fullmatch(extension)
    ):
        expected = "expected KEY.jpg, .jpeg, .png, .webp, .json or .mask<i>.png"
        raise RejectedError(RejectReason.UNEXPECTED_MEMBER, expected)
    return _Named(match[1], extension, member)


def _find_unsafe(name: str) -> str | None:
    if not name or name.endswith("/"):
        return "a file's name that is empty or ends in '/'"
    if name.startswith("/") or ".." in name.split("/"):
        return "an absolute path, or one with '..'"
    if UNPRINTABLE.search(name):
        return "control characters, line separators, or bytes that are not UTF-8"
    if (num_bytes := len(name.encode())) > MAX_NAME_BYTES:
        return f"expected at most {MAX_NAME_BYTES} bytes, got {num_bytes}"
    return None


def _assemble(group: Sequence[_Named]) -> SampleMembers:
    """Return the sample of a key's members, in any order; reject it if it is incomplete."""
    images = [named for named in group if named.extension in IMAGE_FORMATS]
    texts = [named.member for named in group if named.extension == "json"]
    masks = {named.extension: named.member for named in group if _MASK.fullmatch(named.extension)}
    names = {named.member.name for named in images}
    num_different = len(names) + bool(texts) + len(masks)
    if num_different < len(group) and len({named.key for named in images}) < 2:
        detail = f"{len(group)} members, of which {num_different} differ{_describe_forms(group)}"
        raise RejectedError(RejectReason.DUPLICATE_MEMBER, detail)
    if not images:
        raise RejectedError(RejectReason.NO_IMAGE, "expected one image, got 0")
    if len(images) > 1:
        detail = f"expected one image, got {len(images)}{_describe_forms(images)}"
        raise RejectedError(RejectReason.SEVERAL_IMAGES, detail)
    if not texts:
        raise RejectedError(RejectReason.NO_TEXT, "expected KEY.json with the phrases, got none")
    expected = [f"mask{i}.png" for i in range(max(len(masks), 1))]
    if missing := [name for name in expected if name not in masks]:
        detail = f"expected {missing[0]}, got {len(masks)} other masks"
        raise RejectedError(RejectReason.MISSING_MASK, detail)
    image = images[0]
    return SampleMembers(image.key, image.member, texts[0], tuple(masks[x] for x in expected))


def _describe_forms(group: Sequence[_Named]) -> str:
    """Return the end of a detail where a key is spelt in two Unicode forms, which look alike."""
    keys = sorted({named.key for named in group})
    return f"; names that look alike: {' and '.join(map(ascii, keys))}" if len(keys) > 1 else ""


def _printable(text: str) -> str:
    """Return ``text`` cut at a length, with escapes for what no terminal or Parquet takes."""
    if len(text) > _MAX_SHOWN:
        text = text[: _MAX_SHOWN - 1] + "…"
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)
