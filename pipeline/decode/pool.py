"""Samples decoded and cut in processes of their own: several at once, a bad one costs itself.

Data flow: a thread for each worker reads a sample's members, hands them to a worker and gets its
views back; they wait in the tar's order for the caller, bounded by their bytes.

An image that kills its worker, hangs in it or needs more memory than the limits allow is rejected
alone; the next sample gets a new worker. It is tried twice, in two workers, before: what killed the
first may have come from outside (an operator, the kernel short of memory), and a reject must not
depend on that.
"""

import io
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Self

from pipeline.corpus.members import Limits, Reject, RejectedError, RejectReason, SampleMembers
from pipeline.corpus.tar import Member
from pipeline.decode.ahead import work_ahead
from pipeline.decode.pairs import SourceImage, View, assemble_views, describe_cutting, list_outside
from pipeline.decode.process import CutSample, DecodeFailedError, DecodeProcess
from pipeline.decode.sample import read_data, read_phrases, read_whole, reject_sample
from pipeline.decode.views import Cutting
from pipeline.spec.fields import LatentsSpec

NUM_TRIES = 2
BASE_S = 10.0
S_PER_MPX = 1.0
"""A JPEG of 100 scans, the slowest that is taken, took 0.33 s for a megapixel on a busy core."""
_KILLED = "the decoder was killed before the sample was decoded"
WORKER_BYTES = 2 * 1024**3
"""The interpreter and its libraries (0.1 GiB), what WebP reserves before a size is refused, and
the masks of a sample's views (some 10,000 of 384 px)."""
BYTES_PER_PIXEL = 32
"""WebP with alpha takes 28, PNG with alpha 19, a progressive JPEG 14, each turned upright."""


def bound_memory(limits: Limits) -> int:
    """Return the most address space of a worker, in bytes: enough for any image in the limits."""
    return WORKER_BYTES + 2 * limits.max_member_bytes + BYTES_PER_PIXEL * limits.max_pixels


def bound_bytes(members: SampleMembers, spec: LatentsSpec) -> int:
    """Return the most bytes that a sample takes here: its views, and the largest of its members.

    From the names and sizes alone: so many masks are so many phrases, or the sample is rejected.
    """
    num_cuts = len(members.masks) * spec.views
    num_crops = num_cuts if spec.crop == "phrase" else 1
    num_bytes = (3 * num_crops + num_cuts) * (1 + spec.flip) * spec.size**2
    return num_bytes + max(m.size for m in (members.image, members.text, *members.masks))


@dataclass(frozen=True, slots=True, eq=False)
class DecodedSample:
    """What became of a sample.

    ``views``: none where it was rejected, and then the last of ``rejects`` is its sample-level
    reject; all others are pair-level ones. ``num_bytes``: of the views' images and masks.
    ``busy_s``: how long it had a worker, all tries and the reading of its members included.
    """

    views: tuple[View, ...]
    rejects: tuple[Reject, ...]
    num_bytes: int
    busy_s: float


class DecoderKilledError(RuntimeError):
    """A sample was not decoded, since ``SampleDecoder.kill`` was called."""


class _Free:
    """The numbers of the workers that are free; who has waited longest is served first."""

    def __init__(self, num: int) -> None:
        self._lock = threading.Lock()
        self._numbers = list(reversed(range(num)))  # the first again, while one is enough
        self._waiting: deque[queue.SimpleQueue[int]] = deque()

    def take(self) -> int:
        mine: queue.SimpleQueue[int] = queue.SimpleQueue()
        with self._lock:
            if self._numbers:
                return self._numbers.pop()
            self._waiting.append(mine)
        return mine.get()

    def give_back(self, number: int) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().put(number)
            else:
                self._numbers.append(number)


class SampleDecoder:
    """Decodes samples in up to ``num_workers`` workers, which start as they are needed and stay.

    A worker may take ``bound_memory`` of address space (4.4 GiB at the default limits), which only
    an image at the limits comes near: 0.05 GiB and 20 bytes a pixel are usual. A sample takes at
    most ``NUM_TRIES`` times ``base_s`` + ``s_per_mpx`` for each megapixel of its image and of each
    mask, a try no more than ``MAX_SAMPLE_S``, and the time to read its members. Threads may share
    one decoder: workers go to whoever has waited longest.
    """

    def __init__(
        self,
        *,
        num_workers: int = 1,
        limits: Limits = Limits(),
        base_s: float = BASE_S,
        s_per_mpx: float = S_PER_MPX,
        memory_bytes: int | None = None,
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, but got {num_workers}")
        self._limits = limits
        self._base_s = base_s
        self._s_per_mpx = s_per_mpx
        self._memory_bytes = bound_memory(limits) if memory_bytes is None else memory_bytes
        self._processes: list[DecodeProcess | None] = [None] * num_workers
        self._free = _Free(num_workers)
        self._closing = threading.Lock()
        self._starting = threading.Lock()
        self._killed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def num_workers(self) -> int:
        """How many samples are decoded at once."""
        return len(self._processes)

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that run."""
        return [process.pid for process in self._processes if process and process.alive]

    def close(self) -> None:
        """End the workers, each when its sample is done; later calls start others."""
        with self._closing:
            numbers = [self._free.take() for _ in self._processes]
            for number in reversed(numbers):
                if (process := self._processes[number]) is not None:
                    process.end()
                self._free.give_back(number)

    def kill(self) -> None:
        """End all workers at once and start no other; for a decoder that is of no more use.

        A sample that is in work then, or comes later, is an error, not a reject: nothing is wrong
        with it. Any thread may call it, and again. What the workers held is released by ``close``,
        which waits for no decode after this.
        """
        with self._starting:
            self._killed = True
            for process in self._processes:
                if process is not None:
                    process.kill()

    def decode_views(
        self,
        file: BinaryIO,
        groups: Sequence[SampleMembers],
        spec: LatentsSpec,
        *,
        max_bytes: int,
    ) -> Generator[DecodedSample, None, None]:
        """Decode samples and cut them into views, in order, up to ``num_workers`` at once.

        Threads read ``file`` until the generator is exhausted or closed: close it
        (``contextlib.closing``) before the file, which no thread reads after that.

        Args:
            file: the tar that ``groups`` were listed from; a real file needs no common position.
            groups: the samples, from ``group_members``.
            spec: says what the views are.
            max_bytes: most bytes of views that wait, and of samples in work (``bound_bytes``); one
                sample is always taken.

        Yields:
            One a group. Its views may be rejected as those of ``decode_sample`` are, by
            ``DECODER_CRASHED`` and ``DECODER_TIMEOUT``, or ``OUTSIDE_VIEW`` where no view shows a
            phrase.

        Raises:
            DamagedTarError: the tar is shorter than when its members were listed; when the
                sample's turn comes, as all errors.
            OSError: as ``file`` raises it; or no worker can be started here.
            DecoderKilledError: after ``kill``.
        """
        read = open_reader(file)
        yield from work_ahead(
            groups,
            lambda members: self._decode(members, read, spec),
            lambda members: bound_bytes(members, spec),
            num_threads=self.num_workers,
            max_bytes=max_bytes,
        )

    def _decode(
        self, members: SampleMembers, read: Callable[[Member], bytes], spec: LatentsSpec
    ) -> DecodedSample:
        worker = self._free.take()
        start = time.perf_counter()
        try:
            phrases = read_phrases(members, read, self._limits)
            cut = self._cut(worker, members, read, describe_cutting(spec))
        except RejectedError as error:
            views: list[View] = []
            rejects = [reject_sample(members, error.reason, error.detail)]
        else:
            views, rejects = _name_views(cut, members, phrases, spec)
        finally:
            busy_s = time.perf_counter() - start
            self._free.give_back(worker)
        num_bytes = sum(
            view.image.nbytes + sum(pair.mask.nbytes for pair in view.pairs) for view in views
        )
        return DecodedSample(tuple(views), tuple(rejects), num_bytes, busy_s)

    def _cut(
        self,
        worker: int,
        members: SampleMembers,
        read: Callable[[Member], bytes],
        cutting: Cutting,
    ) -> CutSample:
        for _ in range(NUM_TRIES):
            try:
                process = self._get_process(worker)
                return process.cut_sample(members, read, cutting=cutting, limits=self._limits)
            except (DecodeFailedError, OSError) as error:  # its worker is ended
                if self._killed:
                    raise DecoderKilledError(_KILLED) from error
                if isinstance(error, OSError):
                    raise
                failure = error
        raise RejectedError(failure.reason, f"{failure.detail}; the last of {NUM_TRIES} tries")

    def _get_process(self, worker: int) -> DecodeProcess:
        process = self._processes[worker]
        if process is not None and process.alive:
            return process
        with self._starting:  # so that ``kill`` misses none
            if self._killed:
                raise DecoderKilledError(_KILLED)
            process = self._processes[worker] = DecodeProcess(
                memory_bytes=self._memory_bytes, base_s=self._base_s, s_per_mpx=self._s_per_mpx
            )
        process.await_ready()
        return process


def _name_views(
    cut: CutSample, members: SampleMembers, phrases: Sequence[str], spec: LatentsSpec
) -> tuple[list[View], list[Reject]]:
    source = SourceImage(members.key, cut.width, cut.height, cut.sha256)
    views = assemble_views(cut.cuts, cut.pixels, source, phrases, spec)
    rejects = list_outside(cut.cuts, members.key, phrases, describe_cutting(spec))
    if not views:
        detail = "no phrase's mask falls into any view"
        rejects.append(reject_sample(members, RejectReason.OUTSIDE_VIEW, detail))
    return views, rejects


def open_reader(file: BinaryIO) -> Callable[[Member], bytes]:
    """Return what reads a member's data from ``file``, for several threads at once.

    It raises ``DamagedTarError`` where the tar is shorter than when its members were listed, and
    OSError as ``file`` does.
    """
    raw = getattr(file, "raw", file)
    if isinstance(raw, io.FileIO):  # not any file with a fileno: gzip's is the compressed one's
        descriptor = raw.fileno()
        return lambda member: _read_at(descriptor, member)
    lock = threading.Lock()

    def read(member: Member) -> bytes:
        with lock:
            return read_data(file, member)

    return read


def _read_at(descriptor: int, member: Member) -> bytes:
    offset = member.offset

    def read(num_bytes: int) -> bytes:
        nonlocal offset
        piece = os.pread(descriptor, num_bytes, offset)
        offset += len(piece)
        return piece

    return read_whole(member, read)
