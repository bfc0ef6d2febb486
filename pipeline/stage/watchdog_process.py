"""The watchdog's process: kills its parent when that has work but makes no progress.

It imports a few modules of the standard library and nothing of ours (10 MB, 15 ms). Its stdin is
one page of memory shared with the parent: the parent writes, this process reads it a few times a
``stall_s``, so it never holds the parent up. On Linux a pidfd tells at once when the parent ends;
elsewhere the parent's end is seen at the next step. ``PR_SET_PDEATHSIG`` would follow the thread
that started this process, and a worker's threads come and go.
"""

import mmap
import os
import select
import signal
import struct
import sys
import threading
import time
from contextlib import suppress

PROGRESS = struct.Struct("=q24s")  # changes with each beat; the stage of the last one
NUM_IN_HAND = struct.Struct("=i")
TASKS = struct.Struct("=476s")  # UTF-8, zeros after it
NUM_IN_HAND_AT, TASKS_AT, PAGE_BYTES = 32, 36, 512

MAX_STEP_S = 1.0
STEPS_A_STALL = 20
_LOG_LIMIT_S = 1.0  # a log on a dead disk does not keep the parent alive


class StallTimer:
    """Adds up the time in which a parent that should make progress makes none.

    A step counts as ``step_s`` at most, so that time in which the machine slept or this process
    did not run is no stall.
    """

    def __init__(self, *, stall_s: float, step_s: float, now_s: float) -> None:
        self._stall_s, self._step_s, self._last_s = stall_s, step_s, now_s
        self._silent_s = 0.0
        self._progress: object = None

    def update(self, *, now_s: float, progress: object, waited_for: bool) -> bool:
        """Return whether ``progress``, any value, has stayed the same for ``stall_s``."""
        elapsed_s, self._last_s = min(now_s - self._last_s, self._step_s), now_s
        if progress != self._progress or not waited_for:
            self._progress, self._silent_s = progress, 0.0
        else:
            self._silent_s += elapsed_s
        return self._silent_s >= self._stall_s


def main(parent: int, stall_s: float) -> None:
    """Watch until the parent ends or is killed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent decides, and this ends with it
    pidfd = _open_pidfd(parent)
    page = mmap.mmap(0, PAGE_BYTES, access=mmap.ACCESS_READ)
    step_s = min(stall_s / STEPS_A_STALL, MAX_STEP_S)
    timer = StallTimer(stall_s=stall_s, step_s=step_s, now_s=time.monotonic())
    while _is_there(parent, pidfd, step_s):
        (num_in_hand,) = NUM_IN_HAND.unpack_from(page, NUM_IN_HAND_AT)
        halted = not num_in_hand and _is_halted(parent)  # it would never take the next task up
        if timer.update(
            now_s=time.monotonic(),
            progress=(PROGRESS.unpack_from(page)[0], num_in_hand == 0),
            waited_for=num_in_hand > 0 or halted,
        ):
            _log(_describe(page, stall_s, halted=halted))
            _kill(parent, pidfd)
            return


def _open_pidfd(parent: int) -> int | None:
    try:
        return os.pidfd_open(parent)
    except (AttributeError, OSError):  # not Linux, or refused by an old container runtime
        return None


def _is_there(parent: int, pidfd: int | None, step_s: float) -> bool:
    """Wait for ``step_s`` or, on Linux, the parent's end; return whether the parent lives."""
    if pidfd is None:
        time.sleep(step_s)
    else:
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        ended.poll(step_s * 1000)
    # While this is its child, the pid is the parent's own, and was when the pidfd was opened.
    return os.getppid() == parent


def _is_halted(parent: int) -> bool:
    """Return whether SIGSTOP halted the parent; False where there is no /proc to tell."""
    try:
        with open(f"/proc/{parent}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"T"
    except OSError:
        return False


def _describe(page: mmap.mmap, stall_s: float, *, halted: bool) -> str:
    if halted:
        what = f"stopped by a signal for {stall_s:g} s with no task in hand"
    else:
        _, stage = PROGRESS.unpack_from(page)
        (tasks,) = TASKS.unpack_from(page, TASKS_AT)
        what = f"no progress for {stall_s:g} s in task(s) {_text(tasks)}"
        what += f" (the last in stage {_text(stage)})" if _text(stage) else ""
    return f"ldznet: {what}: worker killed; Ray starts another and tries again\n"


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("utf-8", "replace")


def _log(line: str) -> None:
    """Write to the parent's stderr, its log; give up after ``_LOG_LIMIT_S``."""
    data = line.encode("utf-8", "replace")
    writing = threading.Thread(target=os.write, args=(2, data), daemon=True)
    writing.start()
    writing.join(_LOG_LIMIT_S)


def _kill(parent: int, pidfd: int | None) -> None:
    if pidfd is not None:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # no other process can have this number
    elif os.getppid() == parent:
        os.kill(parent, signal.SIGKILL)


if __name__ == "__main__":
    with suppress(ProcessLookupError):  # the parent ended between two looks
        main(int(sys.argv[1]), float(sys.argv[2]))
    os._exit(0)  # past a write that hangs
