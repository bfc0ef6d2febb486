"""Groups a tar's members into samples by their names, and rejects what fits none, with a reason.

A sample is an image ``KEY.jpg`` (or jpeg, png, webp) and, where they are there, its text in
``KEY.json`` or ``KEY.txt``, the masks ``KEY.mask0.png`` ..., one for each phrase in order, and
``KEY.ignore.png``. Extensions may be in any case, and KEY may hold dots; but where the key up to an
earlier dot has an image, "a.depth.png" beside "a.jpg" is no image of its own, as for WebDataset.
The members of a key may stand anywhere in the tar, and are of one key if their names look alike:
"é" is one character on Linux and two on a Mac (Unicode's NFC and NFD).

Every member that is no directory belongs to exactly one sample or reject, or is set aside: what a
Mac leaves beside files, and ``KEY.cls``. A member with another extension (``.pkl``, ``.npy``) is
rejected alone.
"""

import enum
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from pipeline.corpus.tar import Member
from pipeline.corpus.text import UNPRINTABLE

Format = Literal["JPEG", "PNG", "WEBP"]
MAX_METADATA_BYTES = 16 * 1024 * 1024  # a phone's gain map or preview takes 1 to 6 MB
MAX_NAME_BYTES = 255
_MAX_SHOWN = 1500  # characters of a reject's name or detail: a key and a phrase fit
_MASK = re.compile(r"mask(0|[1-9][0-9]{0,4})\.png")
_KEY_AND_EXTENSION = re.compile(
    rf"((?:.*/|)[^./][^/]*?)\.({_MASK.pattern}|ignore\.png|jpe?g|png|webp|json|txt|cls)",
    re.DOTALL | re.IGNORECASE,
)
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Left by a Mac's Finder and archiver: no part of a corpus.
_LEFT_BY_MAC = re.compile(r"(?:.*/|)(?:__MACOSX/.*|\._[^/]*|\.DS_Store)", re.DOTALL)
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
    MEMBER_TOO_LARGE = "member_too_large"  # over Limits.max_member_bytes
    BAD_TEXT = "bad_text"  # no UTF-8, no JSON, too large or deep, or its phrases break a rule
    BAD_IMAGE = "bad_image"  # damaged, animated, or none of JPEG, PNG and WebP
    IMAGE_TOO_LARGE = "image_too_large"  # over Limits.max_pixels
    MISSING_MASK = "missing_mask"  # some phrases of the sample have a mask, and one has none
    BAD_MASK = "bad_mask"  # damaged, RGB, of more than two classes, or more masks than phrases
    MASK_SIZE = "mask_size"  # not of the image's size
    MASKS_TOO_LARGE = "masks_too_large"  # together over Limits.max_mask_pixels
    EMPTY_MASK = "empty_mask"  # without foreground
    DECODER_CRASHED = "decoder_crashed"  # died twice, by a signal or over its memory bound
    DECODER_TIMEOUT = "decoder_timeout"  # came to no end in its time, twice
    OUTSIDE_VIEW = "outside_view"  # a mask of which a view's crop has nothing
    TOO_THIN = "too_thin"  # a mask in the crop, but between the pixels of a view of its size


FORMER_REASONS = ("not_adjacent", "no_text")  # in stores that earlier versions have written


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

    ``key`` is spelt as the image's name spells it. ``text`` is the JSON, ``caption`` the plain one.
    """

    key: str
    image: Member
    text: Member | None = None
    masks: tuple[Member, ...] = ()
    caption: Member | None = None
    ignore: Member | None = None

    @property
    def texts(self) -> tuple[Member, ...]:
        """The text members that are there."""
        return tuple(text for text in (self.text, self.caption) if text is not None)

    @property
    def pictures(self) -> tuple[Member, ...]:
        """The image, its masks and, last, the ignore region."""
        return (self.image, *self.masks, *((self.ignore,) if self.ignore else ()))

    @property
    def members(self) -> tuple[Member, ...]:
        """All members, the image first."""
        return (self.image, *self.texts, *self.pictures[1:])


class TarContents(NamedTuple):
    """What a tar holds, by the names of its members; those ``set_aside`` are in no sample."""

    samples: list[SampleMembers]
    rejects: list[Reject]
    set_aside: list[Member]


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one sample, each at least 1; what exceeds them is rejected."""

    max_member_bytes: int = 256 * 1024 * 1024  # of any member; bounds the memory of a read
    max_pixels: int = 64_000_000  # of the image, by its header; 192 MB as RGB, a large camera's
    max_mask_pixels: int = 1_000_000_000  # of all masks together, a byte each
    max_metadata_bytes: int = MAX_METADATA_BYTES  # text, profiles and previews of an image
    max_text_bytes: int = 16 * 1024 * 1024  # of the JSON: SA-1B's annotations are some MB
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


def group_members(members: Sequence[Member]) -> TarContents:
    """Group all of a tar's members, in any order, into samples and rejects.

    Samples and rejects are in the order of their first members. Nothing is read. Where no member
    fits, those that a sample may have been meant by are rejected as samples, so that the tar does
    not count as one without any.
    """
    refused: list[tuple[Member, RejectedError]] = []
    groups: dict[str, list[_Named]] = {}  # by the key in NFC
    set_aside: list[Member] = []
    for member in members:
        if member.kind == "directory":
            continue
        try:
            named = _classify(member)
        except RejectedError as error:
            refused.append((member, error))
            continue
        if named is None:
            set_aside.append(member)
        else:
            groups.setdefault(unicodedata.normalize("NFC", named.key), []).append(named)
    refused += _take_strays(groups)
    samples: list[SampleMembers] = []
    rejects = _reject_refused(refused, is_all=not groups)
    for group in groups.values():
        try:
            samples.append(_assemble(group))
        except RejectedError as error:
            key = group[0].key
            rejects.append(Reject(key, "sample", error.reason, error.detail, len(group)))
    return TarContents(samples, rejects, set_aside)


def _take_strays(groups: dict[str, list[_Named]]) -> list[tuple[Member, RejectedError]]:
    """Take out the groups that are no samples, and return their members, refused.

    Such is "notes.txt" alone, and "a.depth.png" where "a" has an image: what has a text or a mask
    of its own beside its image is a sample.
    """
    images = {
        key for key, group in groups.items() if any(x.extension in IMAGE_EXTENSIONS for x in group)
    }
    refused = []
    for key in list(groups):
        extensions = {named.extension for named in groups[key]}
        what = ""
        if extensions == {"txt"}:
            what = f"expected an image beside the caption, {key}.jpg, .jpeg, .png or .webp"
        elif key not in images or extensions <= {*IMAGE_EXTENSIONS}:
            dots = [match.start() for match in re.finditer(r"\.(?!.*/)", key, re.DOTALL)]
            if (
                owner := next((key[:dot] for dot in dots if key[:dot] in images), None)
            ) is not None:
                what = f"expected a member of the sample {owner!r}, or a key that does not begin so"
        if what:
            error = RejectedError(RejectReason.UNEXPECTED_MEMBER, what)
            refused += [(named.member, error) for named in groups.pop(key)]
    return refused


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


def _classify(member: Member) -> _Named | None:
    """Take a member's name apart; its extension is one of a sample's. None: it is set aside."""
    if problem := _find_unsafe(member.name):
        raise RejectedError(RejectReason.UNSAFE_NAME, problem)
    if member.kind != "file":
        raise RejectedError(RejectReason.NOT_A_FILE, f"expected a file, got a {member.kind}")
    if _LEFT_BY_MAC.fullmatch(member.name):
        return None
    match = _KEY_AND_EXTENSION.fullmatch(member.name)
    if not match:
        expected = "expected KEY.jpg, .jpeg, .png, .webp, .json, .txt, .mask<i>.png or .ignore.png"
        raise RejectedError(RejectReason.UNEXPECTED_MEMBER, expected)
    extension = match[2].lower()
    return None if extension == "cls" else _Named(match[1], extension, member)


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
    images = [named for named in group if named.extension in IMAGE_EXTENSIONS]
    others = {x.extension: x.member for x in group if x.extension not in IMAGE_EXTENSIONS}
    masks = {name: member for name, member in others.items() if _MASK.fullmatch(name)}
    names = {named.member.name for named in images}
    num_different = len(names) + len(others)
    if num_different < len(group) and len({named.key for named in images}) < 2:
        detail = f"{len(group)} members, of which {num_different} differ{_describe_forms(group)}"
        raise RejectedError(RejectReason.DUPLICATE_MEMBER, detail)
    if not images:
        raise RejectedError(RejectReason.NO_IMAGE, "expected one image, got 0")
    if len(images) > 1:
        detail = f"expected one image, got {len(images)}{_describe_forms(images)}"
        raise RejectedError(RejectReason.SEVERAL_IMAGES, detail)
    expected = [f"mask{i}.png" for i in range(len(masks))]
    if missing := [name for name in expected if name not in masks]:
        detail = f"expected {missing[0]}, got {len(masks)} other masks"
        raise RejectedError(RejectReason.MISSING_MASK, detail)
    return SampleMembers(
        images[0].key,
        images[0].member,
        text=others.get("json"),
        masks=tuple(masks[name] for name in expected),
        caption=others.get("txt"),
        ignore=others.get("ignore.png"),
    )


def _describe_forms(group: Sequence[_Named]) -> str:
    """Return the end of a detail where a key is spelt in two Unicode forms, which look alike."""
    keys = sorted({named.key for named in group})
    return f"; names that look alike: {' and '.join(map(ascii, keys))}" if len(keys) > 1 else ""


def _printable(text: str) -> str:
    """Return ``text`` cut at a length, with escapes for what no terminal or Parquet takes."""
    if len(text) > _MAX_SHOWN:
        text = text[: _MAX_SHOWN - 1] + "…"
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)
