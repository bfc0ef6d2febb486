"""Decodes the members of a sample (text, image, masks), or rejects it with a reason."""

import io
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import BinaryIO

from pipeline.corpus.members import (
    Limits,
    Reject,
    RejectedError,
    RejectReason,
    SampleMembers,
)
from pipeline.corpus.tar import DamagedTarError, Member
from pipeline.corpus.text import CAPTION_BYTES, BadTextError, SampleText, parse_text
from pipeline.decode.images import BadImageError, Picture, decode_picture
from pipeline.decode.masks import Mask, decode_mask
from pipeline.decode.views import Cutting


def reject_sample(members: SampleMembers, reason: RejectReason, detail: str) -> Reject:
    """Return the sample-level reject that accounts for all of a sample's members."""
    return Reject(members.key, "sample", reason, detail, len(members.members))


def read_text(
    members: SampleMembers,
    read: Callable[[Member], bytes],
    limits: Limits,
    *,
    keep_json: Sequence[str] = (),
) -> SampleText:
    """Read a sample's text, and make all checks that need no pixels.

    Raises:
        RejectedError: a member is too large, the text is bad, or some phrases have a mask and there
            is not one mask a phrase.
    """
    for member in members.members:
        if member.size > limits.max_member_bytes:
            detail = f"{member.name}: expected at most {limits.max_member_bytes} bytes"
            raise RejectedError(RejectReason.MEMBER_TOO_LARGE, f"{detail}, got {member.size}")
    text, caption = members.text, members.caption
    if text is not None and text.size > limits.max_text_bytes:
        detail = f"expected at most {limits.max_text_bytes} bytes, got {text.size}"
        raise RejectedError(RejectReason.BAD_TEXT, detail)
    if caption is not None:
        caption = replace(caption, size=min(caption.size, CAPTION_BYTES))
    try:
        found = parse_text(
            None if text is None else read(text),
            None if caption is None else read(caption),
            max_phrases=limits.max_phrases,
            max_phrase_chars=limits.max_phrase_chars,
            keep_json=keep_json,
        )
    except BadTextError as error:
        raise RejectedError(RejectReason.BAD_TEXT, str(error)) from error
    num_masks, num_phrases = len(members.masks), len(found.phrases)
    if num_masks and not num_phrases:
        detail = f'expected {{"phrases": [...]}} with one for each of {num_masks} masks, got none'
        raise RejectedError(RejectReason.BAD_TEXT, detail)
    if num_masks not in (0, num_phrases):
        reason = RejectReason.MISSING_MASK if num_masks < num_phrases else RejectReason.BAD_MASK
        raise RejectedError(
            reason, f"expected no masks or {num_phrases}, one a phrase, got {num_masks}"
        )
    return found


def decode_named_image(
    data: bytes,
    name: str,
    *,
    num_masks: int,
    limits: Limits,
    cutting: Cutting,
    on_size: Callable[[int, int], None] | None = None,
) -> Picture:
    """Decode the image member ``name`` of a sample with ``num_masks`` masks, as the spec has it.

    Raises:
        RejectedError: the image is bad or too large, or its masks would be.
    """
    try:
        picture = decode_picture(
            data,
            max_pixels=limits.max_pixels,
            max_metadata_bytes=limits.max_metadata_bytes,
            on_size=on_size,
            orientation=cutting.orientation,
            color=cutting.color,
        )
    except BadImageError as error:
        too_large = error.reason == "too_large"
        reason = RejectReason.IMAGE_TOO_LARGE if too_large else RejectReason.BAD_IMAGE
        raise RejectedError(reason, f"{name}: {error.detail}") from error
    width, height = picture.image.size
    if num_masks * height * width > limits.max_mask_pixels:
        got = f"{num_masks} masks of {width}x{height}"
        detail = f"expected at most {limits.max_mask_pixels} pixels, got {got}"
        raise RejectedError(RejectReason.MASKS_TOO_LARGE, detail)
    return picture


def decode_named_mask(
    data: bytes,
    name: str,
    *,
    size: tuple[int, int],
    turn: int,
    limits: Limits,
    cutting: Cutting,
    may_be_empty: bool = False,
) -> Mask:
    """Decode the mask member ``name`` of an image of ``size`` (H, W).

    ``turn`` is the orientation in the image's EXIF; an ignore region ``may_be_empty``.

    Raises:
        RejectedError: the mask is bad, empty, or of another size.
    """
    try:
        return decode_mask(
            data,
            size=size,
            turn=turn,
            orientation=cutting.orientation,
            max_metadata_bytes=limits.max_metadata_bytes,
            may_be_empty=may_be_empty,
        )
    except BadImageError as error:
        reasons = {"wrong_size": RejectReason.MASK_SIZE, "empty": RejectReason.EMPTY_MASK}
        reason = reasons.get(error.reason, RejectReason.BAD_MASK)
        raise RejectedError(reason, f"{name}: {error.detail}") from error


def open_reader(file: BinaryIO) -> Callable[[Member], bytes]:
    """Return a function that reads a member's data from ``file``; threads may call it at once.

    It raises DamagedTarError if the tar is shorter than when its members were listed, and OSError
    as ``file`` does.
    """
    raw = getattr(file, "raw", file)
    lock = threading.Lock()

    def read_at(offset: int, num_bytes: int) -> bytes:
        if isinstance(raw, io.FileIO):  # not any file with a fileno: gzip's is the compressed one's
            return os.pread(raw.fileno(), num_bytes, offset)
        with lock:
            file.seek(offset)
            return file.read(num_bytes)

    def read(member: Member) -> bytes:
        data, end = b"", member.offset + member.size
        while missing := member.size - len(data):  # mostly once: a read may give less than asked
            piece = read_at(end - missing, missing)
            if not piece:
                expected = f"{member.size} bytes of data, as when the members were listed"
                raise DamagedTarError(member.offset, expected, f"only {len(data)}")
            data = data + piece if data else piece
        return data

    return read
