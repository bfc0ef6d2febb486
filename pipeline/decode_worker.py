"""The process that decodes: ``python -m pipeline.decode_worker``, as ``decode_process`` starts it.

It imports numpy and Pillow alone, reads requests on stdin until that ends, and keeps nothing
between them. A frame is its length (4 bytes, big-endian) and that much JSON.

    worker   {"ready": PROTOCOL}
    parent   {"kind": "image", "num_bytes": N, "alarm_s": S, "options": {...}}, then N bytes
    worker   {"size": [W, H]}, from the header, before any pixel is decoded
    worker   {"shape": [H, W, 3]}, then H * W * 3 bytes of RGB
    parent   {"kind": "mask", "num_bytes": N, "alarm_s": S, "options": {"size": [H, W], ...}}, ...
    worker   {"shape": [H, W]}, then ceil(H * W / 8) bytes of bits, the first pixel's the highest
    worker   {"reason": ..., "detail": ...} instead, for what ``BadImageError`` says

All else that goes wrong here ends the process, and the parent sees that.
"""

import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from pipeline.images import BadImageError, decode_image, decode_mask

PROTOCOL = 1
MAX_FRAME_BYTES = 64 * 1024
MAX_STDERR_BYTES = 64 * 1024
_MAX_DETAIL = 4000  # characters; a reject keeps fewer
_LENGTH = struct.Struct(">I")


def pack_frame(content: Mapping[str, Any]) -> bytes:
    """Return a frame of JSON, its length first."""
    text = json.dumps(content).encode("ascii")
    return _LENGTH.pack(len(text)) + text


def unpack_length(data: bytes | bytearray) -> int:
    """Return how long a frame's JSON is, from its first 4 bytes."""
    return int(_LENGTH.unpack(data)[0])


def main(memory_bytes: int) -> None:
    """Answer requests until stdin ends, within ``memory_bytes`` of address space."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_STDERR_BYTES, MAX_STDERR_BYTES))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not an answer
    requests = os.fdopen(0, "rb")
    _write(answers, pack_frame({"ready": PROTOCOL}))
    while head := requests.read(_LENGTH.size):
        _answer(json.loads(_read(requests, unpack_length(head))), requests, answers)


def _answer(request: dict[str, Any], requests: BinaryIO, answers: int) -> None:
    data = _read(requests, request["num_bytes"])
    signal.alarm(request["alarm_s"])  # ends a hang whose parent is dead, in C code too
    try:
        if request["kind"] == "mask":
            options = {**request["options"], "size": tuple(request["options"]["size"])}
            pixels = decode_mask(data, **options)
            payload = np.packbits(pixels)
        else:
            pixels = payload = decode_image(
                data,
                on_size=lambda width, height: _write(
                    answers, pack_frame({"size": [width, height]})
                ),
                **request["options"],
            )
    except BadImageError as error:
        _write(answers, pack_frame({"reason": error.reason, "detail": error.detail[:_MAX_DETAIL]}))
    else:
        _write(answers, pack_frame({"shape": pixels.shape}))
        _write(answers, payload.data.cast("B"))
    signal.alarm(0)


def _read(stream: BinaryIO, num_bytes: int) -> bytes:
    data = stream.read(num_bytes)
    if len(data) < num_bytes:
        raise SystemExit(0)  # the parent is gone
    return data


def _write(descriptor: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


if __name__ == "__main__":
    main(int(sys.argv[1]))
