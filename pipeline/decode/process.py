"""One decode worker as its parent sees it: started, asked, timed, ended.

A fresh interpreter (``pipeline.decode.worker``), not a fork of a process that holds CUDA, threads
or Ray, over two pipes. It gets no environment but what an interpreter needs, so no credentials,
and a process group of its own, so that a terminal's Ctrl-C reaches the parent alone. It ends when
the parent does: its stdin ends, and an alarm ends a decode that never would.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.base.child_process import end_child, start_child
from pipeline.corpus.members import Limits, RejectedError, RejectReason, SampleMembers
from pipeline.corpus.tar import Member
from pipeline.decode.views import Box, Cut, Cutting, centre_box, plan_views, whole_box
from pipeline.decode.worker import (
    CUT_INTS,
    CUT_TYPE,
    HEAD,
    MAX_STDERR_BYTES,
    MAX_TEXT_BYTES,
    NOTE_BYTES,
    PIPE_BYTES,
    PROTOCOL,
    drop_bytes,
    pack_frame,
    unpack_length,
)

START_LIMIT_S = 60.0
"""Longest start; it takes 0.1 s, and a cold network file system some seconds."""
MAX_SAMPLE_S = 300.0
"""Longest time for a sample, whatever its pixels.

60 Mpx with 15 masks would have 970 s a try, and two tries more than the 15 min without a result
after which a watchdog takes a worker for hung. They need far less: a mask of 60 Mpx of noise took
0.4 s on a busy core, the slowest JPEG of 60 Mpx some 20 s.
"""
_ALARM_GRACE_S = 10
_EXIT_LIMIT_S = 1.0  # from a closed pipe to a status
_MAX_SHOWN = 200
_MAX_PARTS = 512  # of one write; Linux takes 1024
# glibc gives freed pixels back to the kernel and takes new pages for the next image, which costs
# as much as decoding a JPEG does; so the worker keeps up to 64 MiB.
_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "67108864", "MALLOC_MMAP_THRESHOLD_": "33554432"}
_NOTE = re.compile(rb"([0-9]{1,10}) ([0-9]{1,10}) ([0-9]{1,10}) ([a-z]+( [0-9]+)?) *\n")
_REASONS = frozenset(
    {
        RejectReason.BAD_IMAGE,
        RejectReason.IMAGE_TOO_LARGE,
        RejectReason.MASKS_TOO_LARGE,
        RejectReason.BAD_MASK,
        RejectReason.MASK_SIZE,
        RejectReason.EMPTY_MASK,
    }
)


class DecodeFailedError(RuntimeError):
    """A decode that ended its worker: ``reason`` is one of the two for it, ``detail`` a line."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True, eq=False)
class CutSample:
    """What a worker made of a sample, checked to be what was asked for.

    ``cuts``: each mask's crops, mask after mask. ``pixels``: for each view of ``plan_views`` the
    image (size, size, 3) uint8, and a mask (size, size) uint8 of 0 and 1 a cut.
    """

    width: int
    height: int
    sha256: str
    cuts: tuple[Cut, ...]
    pixels: tuple[tuple[np.ndarray, list[np.ndarray]], ...]


class DecodeProcess:
    """A worker process, started but perhaps not ready yet; one caller at a time but for ``kill``.

    Args:
        memory_bytes: most address space of the worker.
        base_s: time for a sample, however small, in seconds.
        s_per_mpx: more time for each megapixel, in seconds; of the image and each mask.
        max_s: most time for a sample, whatever its pixels, in seconds.

    Raises:
        OSError: there is no such program, or no room for a process.
    """

    def __init__(
        self,
        *,
        memory_bytes: int,
        base_s: float,
        s_per_mpx: float,
        max_s: float = MAX_SAMPLE_S,
    ) -> None:
        self._base_s, self._s_per_mpx, self._max_s = base_s, s_per_mpx, max_s
        self._number = 0
        self._num_pixels = 0  # of the sample, where its time has grown by them
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = _start_worker(memory_bytes, self._errors)
        self.end = weakref.finalize(self, _end_worker, self._process, self._errors)
        """Kill the worker, if it runs, and release what it held; may be called again."""
        self._deadline = time.monotonic() + START_LIMIT_S

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether ``end`` was not called yet, by us or after a failure."""
        return self.end.alive

    def kill(self) -> None:
        """Have the worker die, from any thread: who waits for its answer gets a failure.

        Its pipes stay open until ``end``: another thread may be reading them, and a number that is
        free may become another file's.
        """
        self._process.kill()

    def await_ready(self) -> None:
        """Wait until the worker has started.

        Raises:
            OSError: it cannot be started; this object is of no more use.
        """
        ready = False
        try:
            head = bytearray(4)
            self._read([memoryview(head)])
            self._check(unpack_length(head) <= MAX_TEXT_BYTES, bytes(head))
            answer = self._read_json(unpack_length(head))
            self._check(answer == {"ready": PROTOCOL}, answer)
            ready = True
        except DecodeFailedError as error:
            raise OSError(f"the decode worker cannot be started: {error.detail}") from error
        finally:
            if not ready:  # an interrupt too: a sample would get this answer for its own
                self.end()

    def cut_sample(
        self,
        members: SampleMembers,
        read: Callable[[Member], bytes],
        *,
        cutting: Cutting,
        limits: Limits,
    ) -> CutSample:
        """Have a sample's image and masks decoded and cut.

        Raises:
            RejectedError: the image or a mask is bad or too large.
            DecodeFailedError: the worker died or was ended; this object is of no more use.
            DamagedTarError, OSError: as ``read`` does; likewise.
        """
        self._number += 1
        self._num_pixels = 0
        self._limits, self._num_masks = limits, len(members.masks)
        self._deadline = time.monotonic() + min(self._base_s, self._max_s)
        in_step = False
        try:
            self._send_sample(members, read, cutting)
            answer = self._read_answer(cutting)
            in_step = True
            return answer
        except RejectedError:
            in_step = True
            raise
        finally:
            if not in_step:  # an interrupt too: the next request would get this one's answer
                self.end()

    def _send_sample(
        self, members: SampleMembers, read: Callable[[Member], bytes], cutting: Cutting
    ) -> None:
        most_pixels = self._limits.max_pixels + self._limits.max_mask_pixels
        most_s = min(self._base_s + self._s_per_mpx * most_pixels / 1e6, self._max_s)
        named = (members.image, *members.masks)
        request = {
            "number": self._number,
            "key": members.key,
            "members": [[member.name, member.size] for member in named],
            "limits": dataclasses.asdict(self._limits),
            "cutting": dataclasses.asdict(cutting),
            "alarm_s": math.ceil(most_s) + _ALARM_GRACE_S,
        }
        waiting = [pack_frame(request)]
        for member in named:
            start = time.monotonic()
            waiting.append(read(member))
            self._deadline += time.monotonic() - start
            if sum(map(len, waiting)) >= PIPE_BYTES or len(waiting) == _MAX_PARTS:
                self._write(waiting)
                waiting = []
        self._write(waiting)

    def _write(self, parts: Sequence[bytes]) -> None:
        assert self._process.stdin is not None, "it is a pipe"
        descriptor = self._process.stdin.fileno()
        left = [memoryview(part) for part in parts if part]
        while left:
            try:
                left = drop_bytes(left, os.writev(descriptor, left))
            except BlockingIOError:
                self._wait(descriptor, select.POLLOUT)
            except BrokenPipeError:
                raise self._describe_death() from None

    def _read_answer(self, cutting: Cutting) -> CutSample:
        num_cuts = self._num_masks * cutting.views
        rows = np.empty((num_cuts, CUT_INTS), CUT_TYPE)
        head = bytearray(HEAD.size)
        self._read([memoryview(head), rows.data.cast("B")])
        number, cut, height, width, num_text_bytes, sha256 = HEAD.unpack(head)
        self._check(number == self._number and cut in (0, 1), head)
        if not cut:
            raise self._read_reject(num_text_bytes)
        self._check(0 < height * width <= self._limits.max_pixels, head)
        cuts = self._check_cuts(rows, (height, width), cutting)
        pixels = tuple(self._read_view(len(v.cuts), cutting) for v in plan_views(cuts, cutting))
        return CutSample(width, height, sha256.hex(), cuts, pixels)

    def _read_reject(self, num_bytes: int) -> RejectedError:
        self._check(num_bytes <= MAX_TEXT_BYTES, num_bytes)
        answer = self._read_json(num_bytes)
        reason, detail = answer.get("reason"), answer.get("detail")
        self._check(isinstance(reason, str) and reason in _REASONS, answer)
        self._check(isinstance(detail, str), answer)
        return RejectedError(RejectReason(str(reason)), str(detail))

    def _check_cuts(
        self, rows: np.ndarray, size: tuple[int, int], cutting: Cutting
    ) -> tuple[Cut, ...]:
        """The cuts, each of a box that its crop may have."""
        height, width = size
        side = min(height, width)
        fixed = {"center": centre_box, "resize": whole_box}.get(cutting.crop)
        cuts = []
        for i, (left, top, right, bottom, shown, *prompts) in enumerate(rows.tolist()):
            box = Box(left, top, right, bottom)
            if fixed:
                fits = box == fixed(width, height)
            else:
                fits = right - left == bottom - top == side and min(left, top) >= 0
                fits = fits and right <= width and bottom <= height
            fits = fits and shown in (0, 1) and min(prompts) >= 0
            self._check(fits and max(prompts) < cutting.num_prompts, rows[i].tolist())
            chosen = tuple(prompts[: cutting.num_mirrored])
            cuts.append(Cut(i // cutting.views, box, bool(shown), chosen))
        return tuple(cuts)

    def _read_view(self, num_masks: int, cutting: Cutting) -> tuple[np.ndarray, list[np.ndarray]]:
        size = cutting.size
        image = np.empty((size, size, 3), np.uint8)
        bits = np.empty((num_masks, size * size // 8), np.uint8)
        self._read([image.data.cast("B"), bits.data.cast("B")])
        self._check(bool(bits.any(axis=1).all()), "an empty mask")
        return image, list(np.unpackbits(bits, axis=1).reshape(num_masks, size, size))

    def _read_json(self, num_bytes: int) -> dict[str, Any]:
        text = bytearray(num_bytes)
        self._read([memoryview(text)])
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        self._check(isinstance(answer, dict), text)
        return answer

    def _read(self, left: list[memoryview]) -> None:
        """Fill all of ``left``."""
        assert self._process.stdout is not None, "it is a pipe"
        descriptor = self._process.stdout.fileno()
        while left:
            try:
                num_bytes = os.readv(descriptor, left)
            except BlockingIOError:
                self._wait(descriptor, select.POLLIN)
                continue
            if not num_bytes:
                raise self._describe_death()
            left = drop_bytes(left, num_bytes)

    def _wait(self, descriptor: int, event: int) -> None:
        """Until ``descriptor`` is ready or the time is over."""
        poll = select.poll()
        poll.register(descriptor, event)
        while not poll.poll(max(self._deadline - time.monotonic(), 0) * 1000):
            what, num_pixels = self._read_note()
            if self._num_pixels or not num_pixels:
                detail = f"{what}: not decoded in time"
                raise DecodeFailedError(RejectReason.DECODER_TIMEOUT, detail)
            self._num_pixels = num_pixels
            more_s = self._s_per_mpx * num_pixels * (1 + self._num_masks) / 1e6
            self._deadline += max(min(more_s, self._max_s - self._base_s), 0.0)

    def _read_note(self) -> tuple[str, int]:
        """What the worker is at, and how many pixels its image has: 0 where it does not know."""
        if not self._number:
            return "start", 0
        note = _NOTE.fullmatch(os.pread(self._errors.fileno(), NOTE_BYTES, 0))
        if note is None or int(note[1]) != self._number:
            return "request", 0
        return note[4].decode(), min(int(note[2]) * int(note[3]), self._limits.max_pixels)

    def _describe_death(self) -> DecodeFailedError:
        try:
            status = self._process.wait(timeout=_EXIT_LIMIT_S)
        except subprocess.TimeoutExpired:
            ended = "the worker closed its pipes"
        else:
            ended = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit {status}"
        errors = os.pread(self._errors.fileno(), MAX_STDERR_BYTES, NOTE_BYTES)
        lines = errors.decode("utf-8", "replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")[:_MAX_SHOWN]
        detail = f"{self._read_note()[0]}: {ended}{': ' if last else ''}{last}"
        return DecodeFailedError(RejectReason.DECODER_CRASHED, detail)

    def _check(self, fits: bool, answer: object) -> None:
        if not fits:
            detail = f"{self._read_note()[0]}: the worker answered {answer!r:.{_MAX_SHOWN}}"
            raise DecodeFailedError(RejectReason.DECODER_CRASHED, detail)


def _start_worker(memory_bytes: int, errors: BinaryIO) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])  # last: it may be a site-packages
    paths = [os.path.abspath(path) for path in [*sys.path, root]]
    errors.seek(NOTE_BYTES)  # what is printed comes after the note
    process = start_child(
        ["-P", "-m", "pipeline.decode.worker", str(memory_bytes)],
        environment={"PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}
        | _ALLOCATOR,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
    )
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None, "it is a pipe"
        os.set_blocking(pipe.fileno(), False)
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux; elsewhere a view takes several writes
            with contextlib.suppress(OSError):  # over a user's quota of pipes: slower, no more
                fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return process


def _end_worker(process: subprocess.Popen[bytes], errors: BinaryIO) -> None:
    end_child(process)
    errors.close()
