"""A watchdog that kills a worker which hangs, so that Ray gives its tasks to another.

Ray waits for ever for an actor that is alive but silent: halted, on a dead mount, in a deadlock or
a driver call that does not return. Nothing inside such a process can be relied on, so a small child
process (``watchdog_process``) sends it SIGKILL once it has had work for ``stall_s`` without
progress, or has been halted by SIGSTOP without work for as long. A process in an uninterruptible
call (state D) dies only when that call returns.
"""

import logging
import math
import mmap
import os
import subprocess
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pipeline.base.child_process import end_child, open_shared, start_child
from pipeline.stage.watchdog_process import (
    NUM_IN_HAND,
    NUM_IN_HAND_AT,
    PAGE_BYTES,
    PROGRESS,
    TASKS,
    TASKS_AT,
)

logger = logging.getLogger(__name__)

STALL_S = 15 * 60.0
"""Longer than any step without a beat: loading or compiling a model takes minutes."""
_PROGRAM = Path(__file__).with_name("watchdog_process.py")


class Watchdog:
    """Kills this process when it has work but did not call ``beat`` for ``stall_s`` seconds.

    The kill comes up to a tenth later. Time in which the machine slept does not count. Any thread
    may call any method.

    Raises:
        ValueError: ``stall_s`` is not a positive number.
        OSError: no process can be started.
    """

    def __init__(self, *, stall_s: float = STALL_S) -> None:
        if not 0 < stall_s < math.inf:
            raise ValueError(f"stall_s must be a positive number of seconds, but got {stall_s}")
        self._lock = threading.Lock()
        self._in_hand: Counter[str] = Counter()
        self._page: mmap.mmap | bytearray
        with closing(open_shared("ldznet-watchdog")) as file:
            file.truncate(PAGE_BYTES)  # zeros
            self._page = mmap.mmap(file.fileno(), PAGE_BYTES)
            self._process = start_child(
                ["-I", "-S", str(_PROGRAM), str(os.getpid()), repr(stall_s)],
                stdin=file,
                stdout=subprocess.DEVNULL,
                cwd="/",  # a folder of Ray's, which Ray could not remove while it is in use
            )
        self._warned = False
        self._end = weakref.finalize(self, end_child, self._process)

    def beat(self, stage: str) -> None:
        """Report progress made in ``stage``, a word; takes under a microsecond."""
        PROGRESS.pack_into(self._page, 0, time.monotonic_ns(), stage.encode())

    def begin(self, task: str) -> None:
        """Start a task, from where on progress is expected; the start itself is none."""
        with self._lock:
            self._in_hand[task] += 1
            self._show_in_hand()
            if self._warned or self._process.poll() is None:
                return
            self._warned = True
        logger.warning(
            "the watchdog process ended (status %s): this worker goes on, and will not be killed "
            "if it hangs",
            self._process.returncode,
        )

    def end(self, task: str) -> None:
        """End a task that ``begin`` started, whatever became of it; this counts as progress."""
        with self._lock:
            assert self._in_hand[task] > 0, f"{task} is not in hand"
            self._in_hand -= Counter([task])  # drops it at none
            self._show_in_hand()
            self.beat("end")

    @contextmanager
    def working(self, task: str) -> Iterator[None]:
        """Call ``begin`` before and ``end`` after a block."""
        self.begin(task)
        try:
            yield
        finally:
            self.end(task)

    def close(self) -> None:
        """End the child process; later beats have no effect. Safe to call twice."""
        with self._lock:
            self._warned = True  # this end is meant
            self._end()
            # Not closed, since a thread may be in a beat: the page goes with its last user.
            self._page = bytearray(PAGE_BYTES)

    def _show_in_hand(self) -> None:
        TASKS.pack_into(self._page, TASKS_AT, ", ".join(self._in_hand).encode())
        NUM_IN_HAND.pack_into(self._page, NUM_IN_HAND_AT, self._in_hand.total())
