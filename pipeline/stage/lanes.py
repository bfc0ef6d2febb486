"""Threads that carry parts of work past one device, every step overlapped with every other.

A part is what is missing of one task in one layer. Each lane (latents, features) takes its parts
in order through its own threads; the device's thread serves all lanes:

    fetch -> read -> [inbox, bounded by bytes] -> device -> [outbox, bounded by bytes] -> write
    -> commit

So while one task computes, the next is fetched and decoded, and the last ones are written and
committed. A part that fails goes on through all threads with its batches dropped: each of its
steps has one thread, whatever happens, and its files are let go of last.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from pipeline.stage.byte_queue import ByteQueue, QueueClosedError, get_any
from pipeline.stage.device import Pending

NUM_COMMITTERS = 2  # of a lane: flushing and reading back one task must not hold up the next
CLOSE_TIMEOUT_S = 5.0

T = TypeVar("T")
Progress = Callable[[str], None]


class StageClosedError(RuntimeError):
    """The work was given up, half done: what is committed stays, the rest was abandoned."""


class Batch(Protocol):
    """What one pass of a model reads; its time is booked under ``stage``, one of ``STAGES``."""

    @property
    def num_bytes(self) -> int:
        """Memory that it holds until it is written."""

    @property
    def stage(self) -> str:
        """Where its time on the device is booked."""


class Part(Protocol):
    """What is missing of one task in one layer, cut by the thread that does it.

    Steps run in this order, each in one thread and once, but for ``compute`` and ``write``, once a
    batch. Where one raises, what follows is left out, but for ``abandon``.
    """

    @property
    def read_stage(self) -> str:
        """Where the time of ``read`` is booked."""

    def fetch(self) -> None:
        """Bring the input here and look it over."""

    def read(self) -> Generator[Any, None, None]:
        """Yield the batches; closed early where the part has failed."""

    def compute(self, batch: Any) -> Iterator[Pending]:
        """Run a batch on the device."""

    def write(self, batch: Any, results: Sequence[dict[str, np.ndarray]]) -> None:
        """Write what a batch gave: array name → rows, of each of its passes."""

    def commit(self) -> Any:
        """Publish all that was written; what it returns is the part's result."""

    def abandon(self) -> None:
        """Let go of everything, after the last other step; does nothing after ``commit``."""


@dataclass(eq=False)
class Carried:
    """A part in hand; in the end it has the ``result`` of its commit, or an ``error``."""

    part: Part
    done: Callable[["Carried"], None]
    busy_s: dict[str, float] = field(default_factory=dict)  # by stage
    result: Any = None
    error: BaseException | None = None
    committing: Future[None] | None = None

    def run(self, stage: str | None, step: Callable[[], T]) -> T | None:
        """Run a step and book its time; its error is the part's, and ends the steps after it."""
        if self.error is not None:
            return None
        started_s = time.perf_counter()
        try:
            return step()
        except QueueClosedError:
            raise
        except BaseException as error:  # noqa: BLE001  # given to whoever waits for the part
            self.error = self.error or error
            return None
        finally:
            if stage is not None:
                self.book(stage, time.perf_counter() - started_s)

    def book(self, stage: str, duration_s: float) -> None:
        """Add to a stage's time; a stage has one thread at a time."""
        self.busy_s[stage] = self.busy_s.get(stage, 0.0) + duration_s


class _Step(NamedTuple):
    """A batch on its way; without one, the end of its part."""

    carried: Carried
    batch: Any = None
    results: tuple[Pending, ...] = ()


class _Lane:
    """The threads of one kind of parts, but for the device's."""

    def __init__(
        self,
        name: str,
        *,
        changed: threading.Condition,
        max_bytes: int,
        on_progress: Progress,
        on_crash: Callable[[BaseException], None],
    ) -> None:
        self.num_parts = 0
        self.inbox: ByteQueue[_Step] = ByteQueue(max_bytes, changed=changed)
        self._outbox: ByteQueue[_Step] = ByteQueue(max_bytes)
        self._to_fetch: ByteQueue[Carried] = ByteQueue(0)  # parts have no bytes yet
        self._to_read: ByteQueue[Carried] = ByteQueue(1)  # one is fetched ahead
        self._on_progress = on_progress
        self._committers = ThreadPoolExecutor(NUM_COMMITTERS, f"{name}-commit")
        steps = {"fetch": self._fetch_next, "read": self._read_next, "write": self._write_next}
        self.threads = [
            start_thread(f"{name}-{verb}", step, on_crash=on_crash) for verb, step in steps.items()
        ]

    @property
    def is_full(self) -> bool:
        """Whether what is computed now would have to wait for its writer."""
        return self._outbox.is_full

    def submit(self, carried: Carried) -> None:
        """Take a part in hand; returns at once."""
        self._to_fetch.put(carried, 0)

    def close(self) -> None:
        """End the threads, a commit that has begun excepted; what is in hand stays as it is."""
        for queue in (self._to_fetch, self._to_read, self.inbox, self._outbox):
            queue.close()
        self._committers.shutdown(wait=False, cancel_futures=True)

    def _fetch_next(self) -> None:
        carried = self._to_fetch.get()
        self._to_read.wait_for_room(1)  # a fetched tar may be a copy on this disk
        carried.run("fetch", carried.part.fetch)
        self._on_progress("fetch")
        self._to_read.put(carried, 1)

    def _read_next(self) -> None:
        carried = self._to_read.get()
        carried.run(None, lambda: self._read(carried))
        self.inbox.put(_Step(carried), 0)

    def _read(self, carried: Carried) -> None:
        with closing(carried.part.read()) as batches:
            while True:
                batch = carried.run(carried.part.read_stage, lambda: next(batches, None))
                self._on_progress(carried.part.read_stage)
                if batch is None:
                    return
                self.inbox.put(_Step(carried, batch), batch.num_bytes)

    def compute(self, step: _Step) -> None:
        """Run one step on the device, in the device's thread."""
        carried, batch, _ = step
        results: tuple[Pending, ...] = ()
        if batch is not None:
            results = carried.run(None, lambda: tuple(carried.part.compute(batch))) or ()
            self._on_progress(batch.stage)
        if batch is None or carried.error is None:
            num_bytes = batch.num_bytes + sum(r.num_bytes for r in results) if batch else 0
            self._outbox.put(_Step(carried, batch, results), num_bytes)

    def _write_next(self) -> None:
        carried, batch, results = self._outbox.get()
        if batch is None:
            try:
                carried.committing = self._committers.submit(self._commit, carried)
            except RuntimeError as error:  # shut down
                raise QueueClosedError from error
            return
        arrays = carried.run(None, lambda: [result.wait() for result in results])
        if arrays is not None:
            carried.book(batch.stage, sum(result.busy_s for result in results))
            carried.run("write", lambda: carried.part.write(batch, arrays))
        self._on_progress("write")

    def _commit(self, carried: Carried) -> None:
        carried.result = carried.run("commit", carried.part.commit)
        self._on_progress("commit")
        finish(carried)


def start_thread(
    name: str, step: Callable[[], None], *, on_crash: Callable[[BaseException], None]
) -> threading.Thread:
    """Start a thread that repeats a step until a queue of it is closed.

    What else the step raises is a fault of this module: ``on_crash`` hears of it, and it ends.
    """

    def repeat() -> None:
        try:
            while True:
                step()
        except QueueClosedError:
            return
        except BaseException as error:  # noqa: BLE001  # nobody else would hear of it
            on_crash(error)

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    return thread


def finish(carried: Carried) -> None:
    """Let go of what a part holds and tell whoever waits for it, whatever comes."""
    try:
        carried.part.abandon()
    except BaseException as error:  # noqa: BLE001  # its own error, where it has one, says more
        carried.error = carried.error or error
    finally:
        carried.done(carried)


class Lanes:
    """The threads of one device, from the first part until none is left.

    Args:
        names: of the lanes, in the order in which a task passes them.
        max_bytes: of each inbox and each outbox.
        on_progress: called with a step's name after each, from any thread.
    """

    def __init__(self, names: Sequence[str], *, max_bytes: int, on_progress: Progress) -> None:
        self._changed = threading.Condition()
        self._in_hand: set[Carried] = set()
        self._lock = threading.Lock()
        self.closed = False  # no part is taken any more
        self._lanes = {
            name: _Lane(
                name,
                changed=self._changed,
                max_bytes=max_bytes,
                on_progress=on_progress,
                on_crash=self._crash,
            )
            for name in names
        }
        self._device = start_thread("device", self._compute_next, on_crash=self._crash)

    def submit(self, name: str, part: Part, done: Callable[[Carried], None]) -> bool:
        """Take a part in hand and call ``done`` at its end, from some thread.

        Returns:
            False where the threads have ended; then nothing was done.
        """
        lane = self._lanes[name]

        def finished(carried: Carried) -> None:
            try:
                done(carried)
            finally:
                self._let_go(carried, lane)

        carried = Carried(part, finished)
        with self._lock:
            if self.closed:
                return False
            self._in_hand.add(carried)
            lane.num_parts += 1
            lane.submit(carried)
        return True

    def _let_go(self, carried: Carried, lane: _Lane) -> None:
        with self._lock:
            lane.num_parts -= 1
            self._in_hand.discard(carried)
            if not self._in_hand:
                self._close()

    def _close(self) -> None:
        self.closed = True
        for lane in self._lanes.values():
            lane.close()

    def abandon(self) -> None:
        """Give up what is in hand: no step begins any more, those that run come to their end.

        Where they do not within ``CLOSE_TIMEOUT_S`` what is in hand is answered all the same, and
        its files stay for ``gc``. A commit that has begun answers for itself.
        """
        with self._lock:
            self._close()
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        threads = [self._device, *(t for lane in self._lanes.values() for t in lane.threads)]
        for thread in threads:
            thread.join(max(deadline_s - time.monotonic(), 0))
        commits = [carried.committing for carried in list(self._in_hand) if carried.committing]
        wait(commits, max(deadline_s - time.monotonic(), 0))
        all_ended = not any(thread.is_alive() for thread in threads)
        self._give_up(StageClosedError("the encode stage was closed"), clean=all_ended)

    def _crash(self, error: BaseException) -> None:
        """End everything with an error that is no part's."""
        with self._lock:
            self._close()
        self._give_up(error, clean=False)

    def _give_up(self, error: BaseException, *, clean: bool) -> None:
        for carried in list(self._in_hand):
            if carried.committing is None or carried.committing.cancelled():
                carried.error = carried.error or error
                if clean:
                    finish(carried)
                else:
                    carried.done(carried)

    def _compute_next(self) -> None:
        lanes = list(self._lanes.values())
        inboxes = [lane.inbox for lane in lanes]
        number, step = get_any(inboxes, self._choose, changed=self._changed)
        lanes[number].compute(step)

    def _choose(self, ready: Sequence[int]) -> int:
        """The lane to serve of those with work: the last, so that what is in hand comes to its end.

        But while it has one part only, the one before it, or the device would wait for the commit
        between a task's two parts.
        """
        lanes = list(self._lanes.values())
        free = [number for number in ready if not lanes[number].is_full] or ready
        return free[0] if lanes[free[-1]].num_parts < 2 else free[-1]
