"""Threads that encode several tasks at once, so that one device never waits for input or output.

A ``TaskEncoding`` makes what one task lacks in one layer. Each lane (latents, features) passes its
encodings in order through its own threads; the device's thread serves all lanes:

    fetch -> read -> [inbox, bounded by bytes] -> device -> [outbox, bounded by bytes] -> write
    -> commit

The device prefers features; it serves latents while fewer than two features encodings are in the
lane. An encoding that fails still goes through all threads, with its batches dropped: so each of
its steps has one thread, and its files are released last.
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

NUM_COMMITTERS = 2  # a lane: to flush and read back one task must not hold up the next
CLOSE_TIMEOUT_S = 5.0

T = TypeVar("T")
OnProgress = Callable[[str], None]


class StageClosedError(RuntimeError):
    """The stage was closed before this work ended; what is committed stays."""


class TaskEncoding(Protocol):
    """What one task lacks in one layer, encoded by steps that run in different threads.

    The steps run in the order below, each in one thread and once; ``compute`` and ``write`` once a
    batch. After a step that raises only ``abandon`` runs.
    """

    @property
    def read_stage(self) -> str:
        """The stage, one of ``work.STAGES``, where the time of ``read`` is counted."""

    def fetch(self) -> None:
        """Copy or open the input and check it."""

    def read(self) -> Generator[Any, None, None]:
        """Yield batches, each with ``num_bytes`` and ``stage``; closed early after an error.

        ``num_bytes`` is the memory that a batch holds until it is written; ``stage``, one of
        ``work.STAGES``, is where its time on the device is counted.
        """

    def compute(self, batch: Any) -> Iterator[Pending]:
        """Run a batch on the device, in one or more passes."""

    def write(self, batch: Any, results: Sequence[dict[str, np.ndarray]]) -> None:
        """Write a batch's results: of each of its passes, array name → rows."""

    def commit(self) -> Any:
        """Publish what was written; the returned value is the encoding's result."""

    def abandon(self) -> None:
        """Release all resources; deletes nothing after ``commit``."""


@dataclass(eq=False)
class LaneEntry:
    """A task encoding in a lane; at its end it has a ``result`` or an ``error``."""

    encoding: TaskEncoding
    on_end: Callable[["LaneEntry"], None]
    busy_s: dict[str, float] = field(default_factory=dict)  # by stage
    result: Any = None
    error: BaseException | None = None
    committing: Future[None] | None = None

    def run_step(self, stage: str | None, step: Callable[[], T]) -> T | None:
        """Run a step and count its time; after an error of any step do nothing."""
        if self.error is not None:
            return None
        started_s = time.perf_counter()
        try:
            return step()
        except QueueClosedError:
            raise
        except BaseException as error:  # noqa: BLE001  # given to whoever waits for the encoding
            self.error = self.error or error
            return None
        finally:
            if stage is not None:
                self.add_time(stage, time.perf_counter() - started_s)

    def add_time(self, stage: str, duration_s: float) -> None:
        """Add to a stage's time; only one thread at a time works in a stage."""
        self.busy_s[stage] = self.busy_s.get(stage, 0.0) + duration_s

    def end(self) -> None:
        """Release what the encoding holds, then call ``on_end`` even if that raised."""
        try:
            self.encoding.abandon()
        except BaseException as error:  # noqa: BLE001  # an earlier error says more
            self.error = self.error or error
        finally:
            self.on_end(self)


class _Step(NamedTuple):
    """A batch in a queue; without a batch, the end of its encoding."""

    entry: LaneEntry
    batch: Any = None
    results: tuple[Pending, ...] = ()


class _Lane:
    """The threads of one lane, without the device's thread."""

    def __init__(self, name: str, lanes: "Lanes", *, max_bytes: int) -> None:
        self.num_entries = 0
        self.inbox: ByteQueue[_Step] = ByteQueue(max_bytes, changed=lanes.changed)
        self.outbox: ByteQueue[_Step] = ByteQueue(max_bytes)
        self.to_fetch: ByteQueue[LaneEntry] = ByteQueue(0)  # entries have no bytes yet
        self._to_read: ByteQueue[LaneEntry] = ByteQueue(1)  # one is fetched ahead
        self._on_progress = lanes.on_progress
        self._committers = ThreadPoolExecutor(NUM_COMMITTERS, f"{name}-commit")
        steps = {"fetch": self._fetch_next, "read": self._read_next, "write": self._write_next}
        self.threads = [
            start_thread(f"{name}-{verb}", step, on_crash=lanes.crash)
            for verb, step in steps.items()
        ]

    def close(self) -> None:
        """End the threads; a commit that has begun goes on."""
        for queue in (self.to_fetch, self._to_read, self.inbox, self.outbox):
            queue.close()
        self._committers.shutdown(wait=False, cancel_futures=True)

    def _fetch_next(self) -> None:
        entry = self.to_fetch.get()
        self._to_read.wait_for_room(1)  # a fetched tar may be a copy on this disk
        entry.run_step("fetch", entry.encoding.fetch)
        self._on_progress("fetch")
        self._to_read.put(entry, 1)

    def _read_next(self) -> None:
        entry = self._to_read.get()
        entry.run_step(None, lambda: self._read(entry))
        self.inbox.put(_Step(entry), 0)

    def _read(self, entry: LaneEntry) -> None:
        stage = entry.encoding.read_stage
        with closing(entry.encoding.read()) as batches:
            while True:
                batch = entry.run_step(stage, lambda: next(batches, None))
                self._on_progress(stage)
                if batch is None:
                    return
                self.inbox.put(_Step(entry, batch), batch.num_bytes)

    def compute(self, step: _Step) -> None:
        """Run one step on the device, in the device's thread."""
        entry, batch, _ = step
        results: tuple[Pending, ...] = ()
        if batch is not None:
            results = entry.run_step(None, lambda: tuple(entry.encoding.compute(batch))) or ()
            self._on_progress(batch.stage)
        if batch is None or entry.error is None:
            num_bytes = batch.num_bytes + sum(r.num_bytes for r in results) if batch else 0
            self.outbox.put(_Step(entry, batch, results), num_bytes)

    def _write_next(self) -> None:
        entry, batch, results = self.outbox.get()
        if batch is None:
            try:
                entry.committing = self._committers.submit(self._commit, entry)
            except RuntimeError as error:  # shut down
                raise QueueClosedError from error
            return
        arrays = entry.run_step(None, lambda: [result.wait() for result in results])
        if arrays is not None:
            entry.add_time(batch.stage, sum(result.busy_s for result in results))
            entry.run_step("write", lambda: entry.encoding.write(batch, arrays))
        self._on_progress("write")

    def _commit(self, entry: LaneEntry) -> None:
        entry.result = entry.run_step("commit", entry.encoding.commit)
        self._on_progress("commit")
        entry.end()


def start_thread(
    name: str, step: Callable[[], None], *, on_crash: Callable[[BaseException], None]
) -> threading.Thread:
    """Start a thread that repeats a step until one of its queues is closed.

    Any other error is a fault of this module: the thread ends and ``on_crash`` is called with it.
    """

    def repeat() -> None:
        try:
            while True:
                step()
        except QueueClosedError:
            return
        except BaseException as error:  # noqa: BLE001  # a thread's error is seen by nobody else
            on_crash(error)

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    return thread


class Lanes:
    """The threads of one device, from the first encoding until none is left.

    Args:
        names: the lanes, in the order in which a task goes through them.
        max_bytes: of each inbox and each outbox.
        on_progress: called with a stage's name after each step, from any thread.
    """

    def __init__(self, names: Sequence[str], *, max_bytes: int, on_progress: OnProgress) -> None:
        self.changed = threading.Condition()  # any inbox
        self.on_progress = on_progress
        self.closed = False  # nothing is accepted any more
        self._entries: set[LaneEntry] = set()
        self._lock = threading.Lock()
        self._lanes = {name: _Lane(name, self, max_bytes=max_bytes) for name in names}
        self._device = start_thread("device", self._compute_next, on_crash=self.crash)

    def submit(
        self, name: str, encoding: TaskEncoding, on_end: Callable[[LaneEntry], None]
    ) -> bool:
        """Start an encoding in a lane; ``on_end`` is called at its end, from some thread.

        Returns:
            False where the threads have ended; then nothing was started.
        """
        lane = self._lanes[name]

        def end(entry: LaneEntry) -> None:
            try:
                on_end(entry)
            finally:
                self._remove(entry, lane)

        entry = LaneEntry(encoding, end)
        with self._lock:
            if self.closed:
                return False
            self._entries.add(entry)
            lane.num_entries += 1
            lane.to_fetch.put(entry, 0)
        return True

    def _remove(self, entry: LaneEntry, lane: _Lane) -> None:
        with self._lock:
            lane.num_entries -= 1
            self._entries.discard(entry)
            if not self._entries:
                self._close()

    def _close(self) -> None:
        self.closed = True
        for lane in self._lanes.values():
            lane.close()

    def abandon(self) -> None:
        """End everything: no step begins any more, and steps that run are waited for.

        An entry whose steps do not end within ``CLOSE_TIMEOUT_S`` is answered all the same, and its
        files stay for ``gc``. A commit that has begun gives its own answer.
        """
        with self._lock:
            self._close()
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        threads = [self._device, *(t for lane in self._lanes.values() for t in lane.threads)]
        for thread in threads:
            thread.join(max(deadline_s - time.monotonic(), 0))
        commits = [entry.committing for entry in list(self._entries) if entry.committing]
        wait(commits, max(deadline_s - time.monotonic(), 0))
        all_ended = not any(thread.is_alive() for thread in threads)
        self._fail_all(StageClosedError("the encode stage was closed"), release=all_ended)

    def crash(self, error: BaseException) -> None:
        """End everything with an error that no encoding caused."""
        with self._lock:
            self._close()
        self._fail_all(error, release=False)

    def _fail_all(self, error: BaseException, *, release: bool) -> None:
        for entry in list(self._entries):
            if entry.committing is None or entry.committing.cancelled():
                entry.error = entry.error or error
                if release:
                    entry.end()
                else:
                    entry.on_end(entry)

    def _compute_next(self) -> None:
        lanes = list(self._lanes.values())
        inboxes = [lane.inbox for lane in lanes]
        number, step = get_any(inboxes, self._choose_lane, changed=self.changed)
        lanes[number].compute(step)

    def _choose_lane(self, ready: Sequence[int]) -> int:
        """Return the lane to serve: of those with work the last, so that tasks in hand end first.

        While that lane has one entry only, it is the lane before: otherwise the device would wait
        for the commit between a task's latents and its features. A lane whose outbox is full is
        served only if all are: its results would have to wait for their writer.
        """
        lanes = list(self._lanes.values())
        free = [number for number in ready if not lanes[number].outbox.is_full] or ready
        return free[0] if lanes[free[-1]].num_entries < 2 else free[-1]
