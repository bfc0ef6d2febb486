"""A worker that hangs is killed, so that Ray gives its tasks to another.

Ray never gives up on an actor that is alive and silent: halted, in a driver call that does not
return, on a dead mount, in a deadlock. Nothing inside such a process can be relied on, so a small
process of its own (``pipeline.stage.watchdog_process``) kills it with SIGKILL once it has had work
in hand for ``stall_s`` without progress; a worker without work that SIGSTOP halted, after as long.

A process in an uninterruptible call (state D) dies when that call returns, whoever kills it.
"""

import logging
import math
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

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
"""Above the longest step without a beat: loading a model, or compiling it, takes minutes."""
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")


class Watchdog:
    """Kills this process when work is in hand and ``beat`` was not called for ``stall_s`` seconds.

    Any thread may call any method. Seconds in which the machine slept do not count.

    Args:
        stall_s: longest time without progress, in seconds; it acts up to a tenth later.

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
        with closing(_open_page()) as file:
            self._page = mmap.mmap(file.fileno(), PAGE_BYTES)
            self._process = _start(file, stall_s)
        self._warned = False
        self._end = weakref.finalize(self, _end, self._process)

    @property
    def pid(self) -> int:
        """The watching process's id."""
        return self._process.pid

    def beat(self, stage: str) -> None:
        """Tell of progress, made in ``stage`` (a word); under a microsecond."""
        PROGRESS.pack_into(self._page, 0, time.monotonic_ns(), stage.encode())

    def begin(self, task: str) -> None:
        """Take a task up. From here on progress is expected; this is none itself."""
        with self._lock:
            self._in_hand[task] += 1
            self._show_in_hand()
            self._warn_once()

    def end(self, task: str) -> None:
        """Lay a task down that ``begin`` took up, whatever became of it; this is progress."""
        with self._lock:
            assert self._in_hand[task] > 0, f"{task} is not in hand"
            self._in_hand -= Counter([task])  # drops it at none
            self._show_in_hand()
            self.beat("end")

    @contextmanager
    def working(self, task: str) -> Iterator[None]:
        """``begin`` and ``end`` around a block."""
        self.begin(task)
        try:
            yield
        finally:
            self.end(task)

    def close(self) -> None:
        """End the watching process; beats after that go nowhere. Safe to call twice."""
        with self._lock:
            self._warned = True  # of no death that was meant
            self._end()
            # A thread may be in a beat: the page goes with its last holder.
            self._page = bytearray(PAGE_BYTES)

    def _show_in_hand(self) -> None:
        TASKS.pack_into(self._page, TASKS_AT, ", ".join(self._in_hand).encode())
        NUM_IN_HAND.pack_into(self._page, NUM_IN_HAND_AT, self._in_hand.total())

    def _warn_once(self) -> None:
        if not self._warned and self._process.poll() is not None:
            self._warned = True
            logger.warning(
                "the watchdog process ended (status %s): this worker goes on, and will not be "
                "killed if it hangs",
                self._process.returncode,
            )


def _open_page() -> BinaryIO:
    """Return a file of zeros that is in memory alone where the system has such."""
    if hasattr(os, "memfd_create"):
        file: BinaryIO = os.fdopen(os.memfd_create("ldznet-watchdog"), "r+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115
    file.truncate(PAGE_BYTES)
    return file


def _start(page: BinaryIO, stall_s: float) -> subprocess.Popen[bytes]:
    program = Path(__file__).with_name("watchdog_process.py")
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(program), str(os.getpid()), repr(stall_s)],
        stdin=page,
        stdout=subprocess.DEVNULL,
        env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
        cwd="/",  # holds no folder of Ray's in use
        process_group=0,  # a terminal's Ctrl-C reaches the parent alone
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
