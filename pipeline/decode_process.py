"""One decode worker as its parent sees it: started, asked, timed, ended.

A fresh interpreter (``pipeline.decode_worker``), not a fork of a process that holds CUDA, threads
or Ray, over two pipes. It gets no environment but what an interpreter needs, so no credentials,
and a process group of its own, so that a terminal's Ctrl-C reaches the parent alone. It ends when
the parent does: its stdin ends, and an alarm ends a decode that never would.
"""

import contextlib
import fcntl
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.decode_worker import MAX_FRAME_BYTES, PROTOCOL, pack_frame, unpack_length
from pipeline.images import BadImageError, Format
from pipeline.samples import RejectReason

START_LIMIT_S = 60.0
"""Longest start; it takes 0.1 s, and a cold network file system some seconds."""
_PIPE_BYTES = 1024 * 1024  # Linux' most for a user; a 640x480 image in one write
_ALARM_GRACE_S = 10
_EXIT_LIMIT_S = 1.0  # from a closed pipe to a status
_MAX_SHOWN = 200
# glibc gives freed pixels back to the kernel and takes new pages for the next image, which costs
# as much as decoding a JPEG does; so the worker keeps up to 64 MiB.
_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "67108864", "MALLOC_MMAP_THRESHOLD_": "33554432"}
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")


class DecodeFailedError(RuntimeError):
    """A decode that ended its worker: ``reason`` is one of the two for it, ``detail`` a line."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class DecodeProcess:
    """A running worker. Its two methods are those of ``pipeline.images``; one caller at a time.

    Args:
        memory_bytes: most address space of the worker.
        base_s: time for a sample, however small, in seconds.
        s_per_mpx: more time for each megapixel, in seconds; of the image and each mask.

    Raises:
        OSError: the worker cannot be started.
    """

    def __init__(self, *, memory_bytes: int, base_s: float, s_per_mpx: float) -> None:
        self._base_s = base_s
        self._s_per_mpx = s_per_mpx
        self._what = "start"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = _start(memory_bytes, self._errors)
        self.end = weakref.finalize(self, _end, self._process, self._errors)
        """Kill the worker, if it runs, and release what it held; may be called again."""
        self._deadline = time.monotonic() + START_LIMIT_S
        try:
            answer = self._read_frame()
            self._check(answer == {"ready": PROTOCOL}, answer)
        except DecodeFailedError as error:
            self.end()
            raise OSError(f"the decode worker cannot be started: {error.detail}") from error
        self.begin_sample()

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether ``end`` was not called yet, by us or after a failure."""
        return self.end.alive

    def begin_sample(self) -> None:
        """Start the time of another sample anew."""
        self._left_s = self._base_s
        self._num_masks = 0

    def decode_image(
        self, data: bytes, *, max_pixels: int, formats: Collection[Format], max_metadata_bytes: int
    ) -> np.ndarray:
        """See ``pipeline.images.decode_image``.

        Raises:
            BadImageError: as there.
            DecodeFailedError: the worker died or was ended; this object is of no more use.
        """
        self._what = "image"
        options = {
            "max_pixels": max_pixels,
            "formats": list(formats),
            "max_metadata_bytes": max_metadata_bytes,
        }
        with self._exchange():
            self._send("image", data, options, most_mpx=max_pixels / 1e6)
            answer = self._read_frame()
            if (size := answer.get("size")) is not None:
                self._deadline += self._s_per_mpx * size[0] * size[1] / 1e6
                answer = self._read_frame()
                if "shape" in answer:
                    self._check(sorted(answer["shape"][:2]) == sorted(size), answer)
            return self._read_pixels(answer, most_pixels=max_pixels, dimensions=3)

    def decode_mask(
        self, data: bytes, *, size: tuple[int, int], max_metadata_bytes: int
    ) -> np.ndarray:
        """See ``pipeline.images.decode_mask`` and, for errors, ``decode_image``."""
        self._what = f"mask {self._num_masks}"
        self._num_masks += 1
        options = {"size": list(size), "max_metadata_bytes": max_metadata_bytes}
        height, width = size
        with self._exchange():
            self._deadline += self._s_per_mpx * height * width / 1e6
            self._send("mask", data, options, most_mpx=0)
            answer = self._read_frame()
            self._check(answer.get("shape") in (None, [height, width]), answer)
            return self._read_pixels(answer, most_pixels=height * width, dimensions=2)

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """A request and its answer, on the sample's clock; one that breaks ends the worker."""
        self._deadline = time.monotonic() + self._left_s
        in_step = False
        try:
            yield
            in_step = True
        except BadImageError:
            in_step = True
            raise
        finally:
            self._left_s = self._deadline - time.monotonic()
            if not in_step:  # an interrupt too: the next request would get this one's answer
                self.end()

    def _send(self, kind: str, data: bytes, options: Mapping[str, Any], *, most_mpx: float) -> None:
        most_s = self._deadline - time.monotonic() + self._s_per_mpx * most_mpx
        alarm_s = math.ceil(max(most_s, 0)) + _ALARM_GRACE_S
        request = {"kind": kind, "num_bytes": len(data), "alarm_s": alarm_s, "options": options}
        assert self._process.stdin is not None, "it is a pipe"
        descriptor = self._process.stdin.fileno()
        for part in (pack_frame(request), data):
            left = memoryview(part)
            while left:
                try:
                    left = left[os.write(descriptor, left) :]
                except BlockingIOError:
                    self._wait(descriptor, select.POLLOUT)
                except BrokenPipeError:
                    raise self._describe_death() from None

    def _read_frame(self) -> dict[str, Any]:
        head = bytearray(4)
        self._read_into(memoryview(head))
        num_bytes = unpack_length(head)
        self._check(num_bytes <= MAX_FRAME_BYTES, head)
        text = bytearray(num_bytes)
        self._read_into(memoryview(text))
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        self._check(isinstance(answer, dict), text)
        return answer

    def _read_pixels(
        self, answer: dict[str, Any], *, most_pixels: int, dimensions: int
    ) -> np.ndarray:
        if "reason" in answer:
            raise BadImageError(answer["reason"], answer["detail"])
        shape = answer.get("shape", [])
        num_pixels = math.prod(shape[:2])
        self._check(len(shape) == dimensions and 0 < num_pixels <= most_pixels, answer)
        if dimensions == 3:
            pixels = np.empty(shape, np.uint8)
            self._read_into(pixels.data.cast("B"))
            return pixels
        bits = np.empty(-(-num_pixels // 8), np.uint8)
        self._read_into(bits.data)
        return np.unpackbits(bits, count=num_pixels).view(np.bool_).reshape(shape)

    def _read_into(self, left: memoryview) -> None:
        assert self._process.stdout is not None, "it is a pipe"
        descriptor = self._process.stdout.fileno()
        while left:
            try:
                num_bytes = os.readv(descriptor, [left])
            except BlockingIOError:
                self._wait(descriptor, select.POLLIN)
                continue
            if not num_bytes:
                raise self._describe_death()
            left = left[num_bytes:]

    def _wait(self, descriptor: int, event: int) -> None:
        """Until ``descriptor`` is ready or the time is over."""
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(self._deadline - time.monotonic(), 0) * 1000):
            detail = f"{self._what}: not decoded in time"
            raise DecodeFailedError(RejectReason.DECODER_TIMEOUT, detail)

    def _describe_death(self) -> DecodeFailedError:
        try:
            status = self._process.wait(timeout=_EXIT_LIMIT_S)
        except subprocess.TimeoutExpired:
            ended = "the worker closed its pipes"
        else:
            ended = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit {status}"
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")[:_MAX_SHOWN]
        detail = f"{self._what}: {ended}{': ' if last else ''}{last}"
        return DecodeFailedError(RejectReason.DECODER_CRASHED, detail)

    def _check(self, fits: bool, answer: object) -> None:
        if not fits:
            detail = f"{self._what}: the worker answered {answer!r:.{_MAX_SHOWN}}"
            raise DecodeFailedError(RejectReason.DECODER_CRASHED, detail)


def _start(memory_bytes: int, errors: BinaryIO) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[1])  # last: it may be a site-packages
    paths = [os.path.abspath(path) for path in [*sys.path, root]]
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "pipeline.decode_worker", str(memory_bytes)],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=environment | _ALLOCATOR,
        process_group=0,
    )
    assert process.stdin is not None, "it is a pipe"
    assert process.stdout is not None, "it is a pipe"
    for pipe in (process.stdin, process.stdout):
        os.set_blocking(pipe.fileno(), False)
        with contextlib.suppress(OSError):  # over a user's quota of pipes: slower, no more
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return process


def _end(process: subprocess.Popen[bytes], errors: BinaryIO) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, errors):
        assert stream is not None, "they are pipes"
        stream.close()
