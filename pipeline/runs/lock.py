"""Lock of a run's folder, which one process on any machine holds, and no longer than it lives.

A claim is a numbered JSON file, created create-only, that names its holder, who touches it every
few seconds; the highest number counts. A holder on this machine is dead when its process is gone,
one elsewhere when no touch was seen for ``STALE_S`` by the watcher's own clock. The next number
takes over, and a holder that was only asleep sees it and exits. filelock does not serve: its flock
does not reach other machines on many file servers, nor does an expiry end a holder that wakes up.
"""

import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

logger = logging.getLogger(__name__)

LOCKS = "lock"  # under the folder that is held
BEAT_S = 5.0
STALE_S = 30.0  # without a touch: six beats, since a busy file server may hold up some
POLL_S = 0.5
_PROC = Path("/proc")  # of Linux


class RunHeldError(ValueError):
    """Another run writes to the folder."""


@dataclass(frozen=True, slots=True)
class _Holder:
    """A process, by its machine and its start, since process ids are used again."""

    host: str
    place: str  # the machine's boot and its process namespace; "" where there is no /proc
    pid: int
    started: int  # clock ticks after boot; 0 where there is no /proc

    @classmethod
    def of_this_process(cls) -> Self:
        try:
            boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            place = f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
        except OSError:  # macOS: every holder is judged by its touches alone
            place = ""
        return cls(socket.gethostname(), place, os.getpid(), _read_start(os.getpid()) or 0)


def _read_start(pid: int) -> int | None:
    """Return when a process began, in clock ticks after boot (proc(5), field 22); None: gone."""
    try:
        text = (_PROC / f"{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = text.rpartition(") ")[2].split()
    return None if state in "ZX" else int(fields[18])


class RunLock:
    """Holds a folder during the ``with`` block.

    Args:
        out: the run's folder, which is made.
        name: tells locks of one folder apart; the files are under ``out/lock/name``.
        wait_s: how long to wait for a holder that lives, in seconds.
    """

    def __init__(self, out: Path, name: str, *, wait_s: float = 0.0) -> None:
        self._out, self._folder, self._wait_s = out, out / LOCKS / name, wait_s
        self._holder = _Holder.of_this_process()
        self._number = 0
        self._seen: tuple[int, int, bool | None] = (0, 0, None)  # number, last touch, whether alive
        self._seen_s = 0.0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._touch, name="run-lock", daemon=True)

    def __enter__(self) -> Self:
        """Claim the folder; raises RunHeldError if another run holds it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        until_s, told = time.monotonic() + self._wait_s, False
        while not self._number:
            number, holder = read_newest(self._folder)
            lives = holder is not None and self._check_alive(number, holder)
            if lives is False:
                self._claim(number + 1)
            elif holder and lives and time.monotonic() >= until_s:
                raise self._refuse(holder)
            else:
                if holder and not told:
                    logger.warning(
                        "%s: held by process %d on %s; waiting up to %.0f s to see whether it ends",
                        *(self._out, holder.pid, holder.host, max(self._wait_s, STALE_S)),
                    )
                    told = True
                time.sleep(POLL_S)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Release the folder, at once for whoever waits."""
        self._left.set()
        self._thread.join()
        temporary = self._path.with_suffix(".left")
        try:
            temporary.write_text("{}", encoding="utf-8")
            temporary.replace(self._path)
        except OSError as failure:  # as on a full disk; must not hide the error of the run itself
            logger.warning("%s: %s; the claim is removed instead", self._path, failure)
            for path in (temporary, self._path):
                try:
                    path.unlink(missing_ok=True)
                except OSError as unremoved:
                    logger.warning("%s: %s; free when this process is gone", path, unremoved)

    def check_free(self) -> None:
        """Raise RunHeldError where a process of this machine holds the folder; writes nothing."""
        number, holder = read_newest(self._folder)
        if holder is not None and self._check_alive(number, holder):
            raise self._refuse(holder)

    def _refuse(self, holder: _Holder) -> RunHeldError:
        return RunHeldError(
            f"{self._out}: another run writes here: process {holder.pid} on {holder.host}. Wait "
            "for it or end it, or give this run another --out"
        )

    def _check_alive(self, number: int, holder: _Holder) -> bool | None:
        """Return whether a holder lives, None while that is not known yet."""
        if holder.place and holder.place == self._holder.place:  # here process ids tell
            return _read_start(holder.pid) == holder.started
        try:
            touched_ns = (self._folder / f"{number:08d}.json").stat().st_mtime_ns
        except FileNotFoundError:  # it has just left
            return None
        now_s = time.monotonic()
        if self._seen[:2] != (number, touched_ns):
            touched = self._seen[0] == number  # since it was seen first
            self._seen, self._seen_s = (number, touched_ns, touched or None), now_s
        return False if now_s - self._seen_s > STALE_S else self._seen[2]

    def _claim(self, number: int) -> None:
        path = self._folder / f"{number:08d}.json"
        try:
            with path.open("xb", buffering=0) as file:
                file.write(json.dumps(asdict(self._holder)).encode())
        except FileExistsError:  # another run was faster
            return
        self._number, self._path = number, path
        for old in self._folder.glob("*.json"):
            if old.name < path.name:
                old.unlink(missing_ok=True)

    def _touch(self) -> None:
        touched_s = time.monotonic()
        while not self._left.wait(BEAT_S):
            now_s = time.monotonic()
            try:
                if read_newest(self._folder)[0] > self._number:
                    logger.error("%s: another run took over; this one ends at once", self._out)
                    os._exit(1)  # nothing more of it may reach the folder
                os.utime(self._path)
                touched_s = now_s
            except OSError as error:
                logger.warning("%s: %s", self._path, error)
                held_s = now_s - touched_s
                if held_s > STALE_S - BEAT_S:  # before the next beat another run may take over
                    logger.error(
                        "%s: could not be held for %.0f s; this run ends, go on with --resume",
                        *(self._out, held_s),
                    )
                    os._exit(1)


def read_newest(folder: Path) -> tuple[int, _Holder | None]:
    """Return the highest number, 0 for none, and its holder, None if it has left."""
    numbers = [int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal()]
    number = max(numbers, default=0)
    try:
        plain = json.loads((folder / f"{number:08d}.json").read_text(encoding="utf-8"))
        return number, _Holder(**plain) if plain else None
    except FileNotFoundError:
        return number, None
    except (ValueError, TypeError):  # not written yet, or torn: watched like one elsewhere
        return number, _Holder("an unknown host", "", 0, 0)
