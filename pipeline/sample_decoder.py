"""Samples decoded in a process of their own, so that a bad one costs itself and bounded time.

``decode`` answers as ``decode_sample`` does, for every input that leaves a decoder alive. An image
that kills its worker, hangs in it or needs more memory than the limits allow is rejected alone; the
next sample gets a new worker. It is tried twice, in two workers, before: what killed the first may
have come from outside (an operator, the kernel short of memory), and a reject must not depend on
that.
"""

import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, Self

from pipeline.decode_process import DecodeFailedError, DecodeProcess
from pipeline.samples import Limits, Reject, Sample, SampleMembers, decode_sample

NUM_TRIES = 2
BASE_S = 10.0
S_PER_MPX = 1.0
"""A JPEG of 100 scans, the slowest that is taken, took 0.33 s for a megapixel on a busy core."""
WORKER_BYTES = 2 * 1024**3
"""The interpreter and its libraries (0.1 GiB), and what WebP reserves before a size is refused."""
BYTES_PER_PIXEL = 32
"""WebP with alpha takes 28, PNG with alpha 19, a progressive JPEG 14, each turned upright."""


def bound_memory(limits: Limits) -> int:
    """Return the most address space of a worker, in bytes: enough for any image in the limits."""
    return WORKER_BYTES + 2 * limits.max_member_bytes + BYTES_PER_PIXEL * limits.max_pixels


class SampleDecoder:
    """Decodes samples in a worker, which starts with the first and stays until ``close``.

    Threads may share one: a call waits for the one before it. A sample takes at most ``NUM_TRIES``
    times ``base_s`` + ``s_per_mpx`` for each megapixel of its image and of each mask, and the time
    to read its members.
    """

    def __init__(
        self,
        *,
        limits: Limits = Limits(),
        base_s: float = BASE_S,
        s_per_mpx: float = S_PER_MPX,
        memory_bytes: int | None = None,
    ) -> None:
        self._limits = limits
        self._base_s = base_s
        self._s_per_mpx = s_per_mpx
        self._memory_bytes = bound_memory(limits) if memory_bytes is None else memory_bytes
        self._process: DecodeProcess | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The worker's process id, None where none was started yet or the last one ended."""
        return self._process.pid if self._process and self._process.alive else None

    def close(self) -> None:
        """End the worker; a later call starts another. Safe to call twice."""
        with self._lock:
            if self._process is not None:
                self._process.end()

    def decode(self, file: BinaryIO, members: SampleMembers) -> Sample | Reject:
        """Read and decode one sample.

        Returns:
            The sample, or a sample-level reject that accounts for all its members: those of
            ``decode_sample``, ``DECODER_CRASHED`` and ``DECODER_TIMEOUT``.

        Raises:
            DamagedTarError: the tar is shorter than when its members were listed.
            OSError: as ``file`` raises it; or no worker can be started here.
        """
        with self._lock:
            for _ in range(NUM_TRIES):
                try:
                    return self._try(file, members)
                except DecodeFailedError as error:  # its worker is ended
                    failure = error
        detail = f"{failure.detail}; the last of {NUM_TRIES} tries"
        return Reject(members.key, "sample", failure.reason, detail, members.num_members)

    def decode_all(
        self, file: BinaryIO, groups: Sequence[SampleMembers]
    ) -> Generator[Sample | Reject, None, None]:
        """Decode samples in order, one ahead of the caller, and so in memory at most two.

        A thread reads ``file`` until the iterator is exhausted or closed. Close it
        (``contextlib.closing``) before the file.

        Raises:
            DamagedTarError, OSError: as ``decode`` does, when the sample's turn comes.
        """
        ahead = ThreadPoolExecutor(1, thread_name_prefix="decode-ahead")
        try:
            waiting: Future[Sample | Reject] | None = None
            for members in groups:
                following = ahead.submit(self.decode, file, members)
                if waiting is not None:
                    yield waiting.result()
                waiting = following
            if waiting is not None:
                yield waiting.result()
        finally:
            ahead.shutdown(cancel_futures=True)

    def _try(self, file: BinaryIO, members: SampleMembers) -> Sample | Reject:
        if self._process is None or not self._process.alive:
            self._process = DecodeProcess(
                memory_bytes=self._memory_bytes, base_s=self._base_s, s_per_mpx=self._s_per_mpx
            )
        self._process.begin_sample()
        return decode_sample(file, members, limits=self._limits, decoder=self._process)
