"""Decodes samples and cuts their views in several worker processes, in the tar's order.

A thread per worker reads a sample's members, sends them to the worker and receives the views, which
wait for the caller, bounded by their bytes. An image that kills its worker, hangs or needs more
memory than the limits allow is rejected alone, and the next sample gets a new worker. Before that
it is tried in two workers: the first may have been killed from outside (an operator, the kernel
short of memory), and a reject must not depend on that.
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Self

from pipeline.base.node_fault import NodeError
from pipeline.corpus.members import Limits, Reject, RejectedError, RejectReason, SampleMembers
from pipeline.corpus.tar import Member
from pipeline.corpus.text import SampleText
from pipeline.decode.ahead import work_ahead
from pipeline.decode.pairs import View, build_views, describe_cutting
from pipeline.decode.process import CutSample, DecodeFailedError, DecodeProcess
from pipeline.decode.sample import open_reader, read_text, reject_sample
from pipeline.decode.views import Cutting
from pipeline.spec.fields import LatentsSpec

NUM_TRIES = 2
BASE_S = 10.0
S_PER_MPX = 1.0
"""The slowest JPEG that is accepted, of 100 scans, took 0.33 s a megapixel on a busy core."""
_KILLED = "the decoder was killed before the sample was decoded"
WORKER_BYTES = 2 * 1024**3
"""For interpreter and libraries (0.1 GiB), what WebP reserves before its size is checked, and the
masks of a sample's views (some 10,000 of 384 px)."""
BYTES_PER_PIXEL = 32
"""WebP with alpha takes 28, PNG with alpha 19, progressive JPEG 14, turning it upright included."""


def bound_memory(limits: Limits) -> int:
    """Return a worker's limit of address space, in bytes: enough for any image in the limits."""
    return WORKER_BYTES + 2 * limits.max_member_bytes + BYTES_PER_PIXEL * limits.max_pixels


def bound_bytes(members: SampleMembers, spec: LatentsSpec) -> int:
    """Return the most bytes that a sample takes here: its views and its largest member."""
    num_cuts = len(members.masks) * spec.views
    num_crops = num_cuts if spec.crop == "phrase" and num_cuts else 1
    of_crop = 3 + (members.ignore is not None)
    num_bytes = (of_crop * num_crops + num_cuts) * (1 + spec.flip) * spec.size**2
    return num_bytes + max(member.size for member in members.members)


@dataclass(frozen=True, slots=True, eq=False)
class DecodedSample:
    """A sample's views, or none and a sample-level reject, the last of ``rejects``.

    The other rejects are pair-level ones. ``text`` is that of a sample with views, ``notes`` count
    what was converted of it. ``num_bytes`` is of the views' images and masks; ``busy_s`` is how
    long it had a worker, in all tries and including the reading of its members.
    """

    views: tuple[View, ...]
    rejects: tuple[Reject, ...]
    num_bytes: int
    busy_s: float
    text: SampleText
    notes: Counter[str]


class DecoderKilledError(RuntimeError):
    """A sample was not decoded, since ``SampleDecoder.kill`` was called."""


class SampleDecoder:
    """Decodes samples in up to ``num_workers`` processes, which start when needed; thread-safe.

    A worker may take ``bound_memory`` of address space (4.4 GiB at the default limits; usual are
    0.05 GiB and 20 bytes a pixel). A sample takes at most ``NUM_TRIES`` times ``base_s`` plus
    ``s_per_mpx`` for each megapixel of its image and masks, at most ``MAX_SAMPLE_S`` a try, beside
    the reading of its members.
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
        self._start_process = partial(
            DecodeProcess,
            memory_bytes=bound_memory(limits) if memory_bytes is None else memory_bytes,
            base_s=base_s,
            s_per_mpx=s_per_mpx,
        )
        self._processes: list[DecodeProcess | None] = [None] * num_workers
        self._free = queue.LifoQueue[int]()  # the first one again, while one is enough
        for number in reversed(range(num_workers)):
            self._free.put(number)
        self._closing = threading.Lock()
        self._starting = threading.Lock()
        self._killed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End each worker when its sample is done; later calls start new ones."""
        with self._closing:
            numbers = [self._free.get() for _ in self._processes]
            for number in reversed(numbers):
                if (process := self._processes[number]) is not None:
                    process.end()
                self._free.put(number)

    def kill(self) -> None:
        """Kill all workers at once and start no others; may be called again, by any thread.

        For samples in work, and later ones, ``DecoderKilledError`` is raised, since nothing is
        wrong with them. ``close`` still has to be called.
        """
        with self._starting:
            self._killed = True
            for process in self._processes:
                if process is not None:
                    process.kill()

    def decode_views(
        self, file: BinaryIO, groups: Sequence[SampleMembers], spec: LatentsSpec, *, max_bytes: int
    ) -> Generator[DecodedSample, None, None]:
        """Decode samples and cut them into views, in order, up to ``num_workers`` at a time.

        Threads read ``file`` until the generator is exhausted or closed, so close it
        (``contextlib.closing``) before the file.

        Args:
            file: the tar that ``groups`` were listed from.
            max_bytes: most bytes of waiting views and of samples in work (``bound_bytes``)
                together; one sample is always taken.

        Raises: (each in its sample's turn)
            DamagedTarError: the tar is shorter than when its members were listed.
            OSError: ``file`` cannot be read; as NodeError, no worker can be started.
            DecoderKilledError: after ``kill``.
        """
        read = open_reader(file)
        yield from work_ahead(
            groups,
            lambda members: self._decode(members, read, spec),
            lambda members: bound_bytes(members, spec),
            num_threads=len(self._processes),
            max_bytes=max_bytes,
        )

    def _decode(
        self, members: SampleMembers, read: Callable[[Member], bytes], spec: LatentsSpec
    ) -> DecodedSample:
        worker = self._free.get()
        start = time.perf_counter()
        text, notes = SampleText(), Counter[str]()
        try:
            text = read_text(members, read, self._limits, keep_json=spec.keep_json)
            cut = self._cut(worker, members, read, describe_cutting(spec))
        except RejectedError as error:
            views: list[View] = []
            rejects = [reject_sample(members, error.reason, error.detail)]
        else:
            notes = Counter(text.notes) + Counter(half_value_masks=cut.num_by_half_value)
            views, rejects = build_views(cut.cuts, cut.pixels, cut.source, text, spec)
            if not views:
                thin = any(each.needs_px for each in cut.cuts)  # a larger size would show it
                reason = RejectReason.TOO_THIN if thin else RejectReason.OUTSIDE_VIEW
                detail = "no phrase's mask has a pixel in any view"
                rejects.append(reject_sample(members, reason, detail))
        finally:
            busy_s = time.perf_counter() - start
            self._free.put(worker)
        num_bytes = sum(view.num_bytes for view in views)
        return DecodedSample(tuple(views), tuple(rejects), num_bytes, busy_s, text, notes)

    def _cut(
        self, worker: int, members: SampleMembers, read: Callable[[Member], bytes], cutting: Cutting
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
        try:
            with self._starting:  # so that ``kill`` misses none
                if self._killed:
                    raise DecoderKilledError(_KILLED)
                process = self._processes[worker] = self._start_process()
            process.await_ready()
        except OSError as error:
            raise NodeError(error.errno, str(error)) from error
        return process
