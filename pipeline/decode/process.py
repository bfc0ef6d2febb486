"""Starts one decode worker, sends it samples, checks its answers, and ends it in time.

The worker is a child process (``pipeline.decode.worker``) behind two pipes. It ends when its parent
does: its stdin ends, and an alarm ends a decode that would never end.
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
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.base.child_process import end_child, open_shared, start_child
from pipeline.corpus.members import Limits, RejectedError, RejectReason, SampleMembers
from pipeline.corpus.tar import Member
from pipeline.decode.color import MAX_PROFILE_NAME
from pipeline.decode.views import (
    Box,
    Cut,
    Cutting,
    SourceImage,
    ViewPixels,
    centre_box,
    plan_views,
    whole_box,
)
from pipeline.decode.worker import (
    CUT_INTS,
    CUT_TYPE,
    HEAD,
    MAX_STDERR_BYTES,
    MAX_TEXT_BYTES,
    PIPE_BYTES,
    READY,
    STATUS_BYTES,
    batch_parts,
    drop_bytes,
    pack_frame,
)

START_LIMIT_S = 60.0  # usual are 0.1 s, and some seconds from a cold network file system
MAX_SAMPLE_S = 300.0
"""Longest time for a sample, whatever its pixels: two tries must end before the watchdog's 15 min.

It is enough for 60 Mpx with 15 masks: on a busy core the slowest JPEG took 20 s, a mask 0.4 s.
"""
_ALARM_GRACE_S = 10
_EXIT_LIMIT_S = 1.0  # from a closed pipe to a status
_MAX_SHOWN = 200
# glibc would return freed pixels to the kernel and take new pages for the next image, which costs
# as much as decoding a JPEG; so the worker keeps up to 64 MiB.
_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "67108864", "MALLOC_MMAP_THRESHOLD_": "33554432"}
_STATUS = re.compile(rb"([0-9]{1,10}) ([0-9]{1,10}) ([0-9]{1,10}) ([a-z]+( [0-9]+)?) *\n")
_REASONS = (  # that a worker rejects by
    *("bad_image", "image_too_large", "masks_too_large"),
    *("bad_mask", "mask_size", "empty_mask"),
)


class DecodeFailedError(RuntimeError):
    """A decode that ended its worker; ``reason`` is DECODER_CRASHED or DECODER_TIMEOUT."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True, eq=False)
class CutSample:
    """A sample that a worker decoded and cut, checked to be what was asked for.

    ``cuts``: the crops of each mask, mask after mask. ``pixels``: of each view of ``plan_views``.
    ``num_by_half_value``: masks whose values left half of the range to decide.
    """

    source: SourceImage
    cuts: tuple[Cut, ...]
    pixels: tuple[ViewPixels, ...]
    num_by_half_value: int = 0


class DecodeProcess:
    """A worker process, started but perhaps not ready yet. One thread may use it, any may ``kill``.

    Args:
        memory_bytes: limit of the worker's address space.
        base_s: time for a sample of any size, in seconds.
        s_per_mpx: additional time for each megapixel of the image and of each mask, in seconds.
        max_s: most time for a sample, in seconds.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(
        self, *, memory_bytes: int, base_s: float, s_per_mpx: float, max_s: float = MAX_SAMPLE_S
    ) -> None:
        self._base_s, self._s_per_mpx, self._max_s = base_s, s_per_mpx, max_s
        self._number = 0
        self._num_pixels = 0  # of the sample's image, once they have been added to its time
        self._errors = open_shared("ldznet-decoder")
        self._process = _start_worker(memory_bytes, self._errors)
        self.end = weakref.finalize(self, _end_worker, self._process, self._errors)
        """Kill the worker, if it runs, and close its pipes; may be called again."""
        self._deadline = time.monotonic() + START_LIMIT_S

    @property
    def alive(self) -> bool:
        """Whether ``end`` was not called yet, by the caller or after a failure."""
        return self.end.alive

    def kill(self) -> None:
        """Kill the worker, from any thread; a thread that waits for its answer gets a failure.

        Its pipes stay open until ``end``, since that thread may be reading them and a descriptor
        that is closed may become another file's.
        """
        self._process.kill()

    def await_ready(self) -> None:
        """Wait until the worker has started.

        Raises:
            OSError: it cannot be started; this object cannot be used again.
        """
        answer = bytearray(len(READY))
        try:
            self._read([memoryview(answer)])
            self._check(answer == READY, bytes(answer))
        except BaseException as error:  # an interrupt too: a sample would get this answer
            self.end()
            if isinstance(error, DecodeFailedError):
                raise OSError(f"the decode worker cannot be started: {error.detail}") from error
            raise

    def cut_sample(
        self,
        members: SampleMembers,
        read: Callable[[Member], bytes],
        *,
        cutting: Cutting,
        limits: Limits,
    ) -> CutSample:
        """Have a sample's image and masks decoded and cut; ``read`` returns a member's data.

        After any error but RejectedError the worker is ended, and this object cannot be used again.

        Raises:
            RejectedError: the image or a mask is bad or too large.
            DecodeFailedError: the worker died or took too long.
            DamagedTarError, OSError: raised by ``read``.
        """
        self._number += 1
        self._num_pixels = 0
        self._limits, self._num_masks = limits, len(members.masks)
        self._ignores = members.ignore is not None
        self._deadline = time.monotonic() + min(self._base_s, self._max_s)
        try:
            for parts in batch_parts(self._list_request(members, read, cutting)):
                self._write(parts)
            return self._read_answer(members.key, cutting)
        except RejectedError:
            raise
        except BaseException:  # an interrupt too: the next request would get this one's answer
            self.end()
            raise

    def _list_request(
        self, members: SampleMembers, read: Callable[[Member], bytes], cutting: Cutting
    ) -> Iterator[bytes]:
        """Yield the parts of a request; time spent reading members does not count."""
        most_pixels = self._limits.max_pixels + self._limits.max_mask_pixels
        most_s = min(self._base_s + self._s_per_mpx * most_pixels / 1e6, self._max_s)
        request = {
            "number": self._number,
            "key": members.key,
            "members": [[member.name, member.size] for member in members.pictures],
            "ignores": self._ignores,
            "limits": dataclasses.asdict(self._limits),
            "cutting": dataclasses.asdict(cutting),
            "alarm_s": math.ceil(most_s) + _ALARM_GRACE_S,
        }
        yield pack_frame(request)
        for member in members.pictures:
            start = time.monotonic()
            data = read(member)
            self._deadline += time.monotonic() - start
            yield data

    def _write(self, left: list[memoryview]) -> None:
        assert self._process.stdin is not None, "it is a pipe"
        descriptor = self._process.stdin.fileno()
        while left:
            try:
                left = drop_bytes(left, os.writev(descriptor, left))
            except BlockingIOError:
                self._wait(descriptor, select.POLLOUT)
            except BrokenPipeError:
                raise self._describe_death() from None

    def _read_answer(self, key: str, cutting: Cutting) -> CutSample:
        num_cuts = self._num_masks * cutting.views
        rows = np.empty((num_cuts, CUT_INTS), CUT_TYPE)
        head = bytearray(HEAD.size)
        self._read([memoryview(head), *([rows.data.cast("B")] if num_cuts else [])])
        number, cut, height, width, num_text_bytes, sha256 = HEAD.unpack(head)
        self._check(number == self._number and cut in (0, 1), head)
        if not cut:
            reason, detail = self._read_text(num_text_bytes, "reason", "detail")
            self._check(reason in _REASONS and isinstance(detail, str), (reason, detail))
            raise RejectedError(RejectReason(reason), detail)
        self._check(0 < height * width <= self._limits.max_pixels, head)
        cuts = self._check_cuts(rows, (height, width), cutting)
        turn, profile, num_by_half_value = self._read_text(
            num_text_bytes, "orientation", "color_profile", "half_value_masks"
        )
        self._check(type(turn) is int and 1 <= turn <= 8, turn)
        most = self._num_masks + self._ignores
        self._check(num_by_half_value in range(most + 1), num_by_half_value)
        fits = profile is None or (isinstance(profile, str) and profile.isprintable())
        self._check(fits and len(profile or "") <= MAX_PROFILE_NAME, profile)
        views = plan_views(cuts, cutting, width=width, height=height)
        pixels = tuple(self._read_view(len(view.cuts), cutting) for view in views)
        source = SourceImage(key, width, height, sha256.hex(), turn, profile)
        return CutSample(source, cuts, pixels, num_by_half_value)

    def _read_text(self, num_bytes: int, *names: str) -> tuple[Any, ...]:
        """Read a JSON object, and return its values of some names."""
        self._check(num_bytes <= MAX_TEXT_BYTES, num_bytes)
        text = bytearray(num_bytes)
        self._read([memoryview(text)])
        try:
            answer = json.loads(text)
            return tuple(answer[name] for name in names)
        except (ValueError, TypeError, KeyError):
            raise self._refuse(text) from None

    def _check_cuts(
        self, rows: np.ndarray, size: tuple[int, int], cutting: Cutting
    ) -> tuple[Cut, ...]:
        """Return the cuts, each of a box that its crop may have."""
        height, width = size
        side = min(height, width)
        fixed = {"center": centre_box, "resize": whole_box}.get(cutting.crop)
        cuts = []
        for i, (left, top, right, bottom, shown, needs_px, *prompts) in enumerate(rows.tolist()):
            box = Box(left, top, right, bottom)
            if fixed:
                fits = box == fixed(width, height)
            else:
                fits = right - left == bottom - top == side and min(left, top) >= 0
                fits = fits and right <= width and bottom <= height
            larger = needs_px > cutting.size and not shown
            fits = fits and shown in (0, 1) and (needs_px == 0 or larger) and min(prompts) >= 0
            self._check(fits and max(prompts) < cutting.num_prompts, rows[i].tolist())
            chosen = tuple(prompts[: cutting.num_mirrored])
            cuts.append(Cut(i // cutting.views, box, bool(shown), chosen, needs_px))
        return tuple(cuts)

    def _read_view(self, num_masks: int, cutting: Cutting) -> ViewPixels:
        size, num = cutting.size, num_masks + self._ignores
        image = np.empty((size, size, 3), np.uint8)
        bits = np.empty((num, size * size // 8), np.uint8)
        self._read([image.data.cast("B"), *([bits.data.cast("B")] if num else [])])
        self._check(bool(bits[:num_masks].any(axis=1).all()), "an empty mask")
        masks = list(np.unpackbits(bits, axis=1).reshape(num, size, size))
        return ViewPixels(image, masks[:num_masks], masks[-1] if self._ignores else None)

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
        """Wait until ``descriptor`` is ready or the time is over, which grows with the pixels."""
        poll = select.poll()
        poll.register(descriptor, event)
        while not poll.poll(max(self._deadline - time.monotonic(), 0) * 1000):
            what, num_pixels = self._read_status()
            if self._num_pixels or not num_pixels:
                detail = f"{what}: not decoded in time"
                raise DecodeFailedError(RejectReason.DECODER_TIMEOUT, detail)
            self._num_pixels = num_pixels
            num = 1 + self._num_masks + self._ignores
            more_s = self._s_per_mpx * num_pixels * num / 1e6
            self._deadline += max(min(more_s, self._max_s - self._base_s), 0.0)

    def _read_status(self) -> tuple[str, int]:
        """Return what the worker is doing, and its image's number of pixels, 0 if unknown."""
        if not self._number:
            return "start", 0
        status = _STATUS.fullmatch(os.pread(self._errors.fileno(), STATUS_BYTES, 0))
        if status is None or int(status[1]) != self._number:
            return "request", 0
        return status[4].decode(), min(int(status[2]) * int(status[3]), self._limits.max_pixels)

    def _describe_death(self) -> DecodeFailedError:
        try:
            status = self._process.wait(timeout=_EXIT_LIMIT_S)
        except subprocess.TimeoutExpired:
            ended = "the worker closed its pipes"
        else:
            ended = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit {status}"
        errors = os.pread(self._errors.fileno(), MAX_STDERR_BYTES, STATUS_BYTES)
        lines = errors.decode("utf-8", "replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")[:_MAX_SHOWN]
        detail = f"{self._read_status()[0]}: {ended}{': ' if last else ''}{last}"
        return DecodeFailedError(RejectReason.DECODER_CRASHED, detail)

    def _check(self, fits: bool, answer: object) -> None:
        if not fits:
            raise self._refuse(answer)

    def _refuse(self, answer: object) -> DecodeFailedError:
        detail = f"{self._read_status()[0]}: the worker answered {answer!r:.{_MAX_SHOWN}}"
        return DecodeFailedError(RejectReason.DECODER_CRASHED, detail)


def _start_worker(memory_bytes: int, errors: BinaryIO) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])  # last: it may be a site-packages
    paths = [os.path.abspath(path) for path in [*sys.path, root]]
    errors.seek(STATUS_BYTES)  # what is printed comes after the status
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
