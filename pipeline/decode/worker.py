"""The decode worker's main loop: ``python -m pipeline.decode.worker``, started by ``process``.

It imports numpy and Pillow alone, reads requests on stdin until that ends, and keeps nothing
between them. Numbers are little-endian; a frame is its length (4 bytes) and that much JSON.

    worker   READY
    parent   frame {"number": N, "key": ..., "members": [[name, num_bytes], ...], "ignores": bool,
             "limits": {...}, "cutting": {...}, "alarm_s": S}, then each member's bytes: the
             image's, the masks' and, if it ignores, the ignore region's
    worker   HEAD, the number N in it; then for each cut (a mask's crop; masks in order) CUT_INTS
             integers, zeros in a reject. Then JSON: {"orientation": ..., "color_profile": ...,
             "half_value_masks": ...}, or of a reject {"reason": ..., "detail": ...}. Then, for each
             view as ``plan_views`` lists them, size * size * 3 bytes of RGB and size * size bits a
             mask and for the ignore region, the first pixel's the highest of a byte

Any other error ends the process, which the parent sees. What it is doing it writes to the first
STATUS_BYTES of stderr, a file that the parent reads only when an answer is late.
"""

import hashlib
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from pipeline.corpus.members import Limits, RejectedError
from pipeline.decode.images import Picture
from pipeline.decode.sample import decode_named_image, decode_named_mask
from pipeline.decode.views import Cut, Cutting, cut_phrase, render_views

HEAD = struct.Struct("<5I32s")
"""Request's number, whether there are views, height and width of the decoded image, bytes of JSON,
SHA-256 of the image member."""
CUT_INTS = 8
"""Left, top, right, bottom, shown, the larger size that a mask needs, and the prompt's number in
the plain and the mirrored view."""
CUT_TYPE = np.dtype("<i4")
STATUS_BYTES = 64
MAX_TEXT_BYTES = 64 * 1024  # of JSON in an answer
MAX_STDERR_BYTES = 64 * 1024
PIPE_BYTES = 1024 * 1024  # Linux' limit for a user; the views of a usual sample are one write
_MAX_DETAIL = 4000  # characters; a reject keeps fewer
_MAX_PARTS = 512  # of one write; Linux and macOS take 1024
_LENGTH = struct.Struct("<I")


def pack_frame(content: Mapping[str, Any]) -> bytes:
    """Return a frame of JSON, its length first."""
    text = json.dumps(content).encode("ascii")
    return _LENGTH.pack(len(text)) + text


READY = pack_frame({"ready": 4})  # with the protocol's number


def main(memory_bytes: int) -> None:
    """Answer requests until stdin ends, within ``memory_bytes`` of address space."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_STDERR_BYTES, MAX_STDERR_BYTES))
    with suppress(ValueError, OSError):  # macOS sets none; elsewhere a lower one is set already
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not an answer
    requests = os.fdopen(0, "rb")
    _write(answers, [READY])
    while head := requests.read(_LENGTH.size):
        request = json.loads(_read(requests, *_LENGTH.unpack(head)))
        _write(answers, _answer(request, requests))
        signal.alarm(0)


@dataclass
class _Decoded:
    """A sample's picture, the crops of its masks, and its ignore region (H, W) bool if any."""

    picture: Picture
    sha256: bytes
    cuts: list[Cut] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    ignore_HW: np.ndarray | None = None
    num_by_half_value: int = 0


def _answer(request: dict[str, Any], requests: BinaryIO) -> Iterator[bytes | memoryview]:
    """Yield the parts of an answer; every member is read before the first."""
    cutting = Cutting(**request["cutting"])
    members = _read_members(request, requests)
    num_cuts = (len(request["members"]) - 1 - request["ignores"]) * cutting.views
    try:
        found = _decode(request, members, cutting)
    except RejectedError as error:
        for _ in members:
            pass
        text = json.dumps({"reason": error.reason, "detail": error.detail[:_MAX_DETAIL]}).encode()
        yield HEAD.pack(request["number"], 0, 0, 0, len(text), b"")
        yield bytes(num_cuts * CUT_INTS * CUT_TYPE.itemsize)
        yield text
        return
    image, cuts = found.picture.image, found.cuts
    _write_status(request["number"], "views", *image.size)
    facts = {
        "orientation": found.picture.orientation,
        "color_profile": found.picture.color_profile,
        "half_value_masks": found.num_by_half_value,
    }
    text = json.dumps(facts).encode()
    yield HEAD.pack(request["number"], 1, image.height, image.width, len(text), found.sha256)
    rows = [(*cut.box, cut.shown, cut.needs_px, *(*cut.prompts, 0)[:2]) for cut in cuts]
    yield np.array(rows, CUT_TYPE).tobytes()
    yield text
    for view in render_views(image, cuts, found.masks, cutting, found.ignore_HW):
        yield view.image.data.cast("B")
        yield from (np.packbits(mask).data for mask in view.masks)
        if view.ignore is not None:
            yield np.packbits(view.ignore).data


def _decode(request: dict[str, Any], members: Iterator[bytes], cutting: Cutting) -> _Decoded:
    limits = Limits(**request["limits"])
    names = [name for name, _ in request["members"]]
    number = request["number"]
    sizes = [(0, 0)]  # of the image, before it is turned upright

    def on_size(width: int, height: int) -> None:
        sizes.append((width, height))
        _write_status(number, "image", width, height)

    _write_status(number, "image", 0, 0)
    data = next(members)
    picture = decode_named_image(
        data, names[0], num_masks=len(names) - 1, limits=limits, cutting=cutting, on_size=on_size
    )
    num_masks = len(names) - 1 - request["ignores"]
    found = _Decoded(picture, hashlib.sha256(data).digest())
    size = (picture.image.height, picture.image.width)
    turn = picture.orientation
    for i, (name, data) in enumerate(zip(names[1:], members, strict=True)):
        _write_status(number, f"mask {i}", *sizes[-1])
        mask_HW, by_half_value = decode_named_mask(
            data,
            name,
            size=size,
            turn=turn,
            limits=limits,
            cutting=cutting,
            may_be_empty=i == num_masks,
        )
        found.num_by_half_value += by_half_value
        if i == num_masks:
            found.ignore_HW = mask_HW
            continue
        for cut, mask in cut_phrase(mask_HW, i, cutting, key=request["key"]):
            found.cuts.append(cut)
            found.masks.append(mask if cut.shown else mask[:0])
    return found


def _read_members(request: dict[str, Any], requests: BinaryIO) -> Iterator[bytes]:
    """Yield each member's bytes; an alarm ends a decode that hangs when the parent is dead."""
    for _, num_bytes in request["members"]:
        signal.alarm(0)  # a read ends with the parent anyway
        data = _read(requests, num_bytes)
        signal.alarm(request["alarm_s"])  # which ends C code too
        yield data


def _write_status(number: int, what: str, width: int, height: int) -> None:
    os.pwrite(2, f"{number} {width} {height} {what}".ljust(STATUS_BYTES - 1).encode() + b"\n", 0)


def _read(stream: BinaryIO, num_bytes: int) -> bytes:
    data = stream.read(num_bytes)
    if len(data) < num_bytes:
        raise SystemExit(0)  # the parent is gone
    return data


def _write(descriptor: int, parts: Iterable[bytes | memoryview]) -> None:
    """Write all parts to a descriptor that blocks."""
    for left in batch_parts(parts):
        while left := drop_bytes(left, os.writev(descriptor, left)):
            pass


def batch_parts(parts: Iterable[bytes | memoryview]) -> Iterator[list[memoryview]]:
    """Yield as many parts at a time as a pipe holds, since each write wakes the reader."""
    waiting: list[memoryview] = []
    num_bytes = 0
    for part in filter(len, parts):
        if waiting and (num_bytes + len(part) > PIPE_BYTES or len(waiting) == _MAX_PARTS):
            yield waiting
            waiting, num_bytes = [], 0
        waiting.append(memoryview(part))
        num_bytes += len(part)
    if waiting:
        yield waiting


def drop_bytes(parts: list[memoryview], num_bytes: int) -> list[memoryview]:
    """Return ``parts`` without their first ``num_bytes``; no empty part."""
    for i, part in enumerate(parts):
        if num_bytes < len(part):
            return [part[num_bytes:], *parts[i + 1 :]]
        num_bytes -= len(part)
    return []


if __name__ == "__main__":
    main(int(sys.argv[1]))
