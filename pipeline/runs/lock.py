"""One run at a time writes to a folder, whichever machine it is on.

Data flow: a claim is a numbered file, made create-only; the highest number holds. Its holder
touches it every few seconds. Whoever finds a holder on its own machine looks whether that process
lives; of one elsewhere it watches the touches, by its own clock alone. A dead one is followed by
the next number. One that was only asleep finds the higher number when it wakes, and ends.
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


class RunHeldError(ValueError):
    """Another run writes to the folder."""


@dataclass(frozen=True, slots=True)
class _Holder:
    """A process: on which machine, and since when, as process ids come again."""

    host: str
    place: str  # the machine's boot and its process namespace
    pid: int
    started: int  # kernel's clock ticks after boot

    @classmethod
    def of_this_process(cls) -> Self:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        started = _read_start(os.getpid())
        assert started is not None
        return cls(socket.gethostname(), place, os.getpid(), started)

    def lives(self) -> bool:
        """Tell whether the process is there still; asked on its own machine."""
        return _read_start(self.pid) == self.started


def _read_start(pid: int) -> int | None:
    """Return when a process began, in clock ticks after boot (proc(5), field 22); None: gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = text.rpartition(") ")[2].split()
    return None if state in "ZX" else int(fields[18])


class RunLock:
    """Holds a folder from entering the ``with`` block to leaving it."""

    def __init__(self, out: Path, name: str, *, wait_s: float = 0.0) -> None:
        """Prepare it; ``wait_s`` is how long to wait for a holder that lives.

        ``name`` tells locks of one folder apart; the files are under ``out/lock/name``.
        """
        self._out, self._folder, self._wait_s = out, out / LOCKS / name, wait_s
        self._holder = _Holder.of_this_process()
        self._number = 0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)

    def __enter__(self) -> Self:
        """Claim the folder, which is made.

        Raises:
            RunHeldError: another run holds it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        watch = _Watch(self._folder)
        until_s = time.monotonic() + self._wait_s
        while not self._number:
            number, holder = read_newest(self._folder)
            if watch.is_free(number, holder, self._holder.place):
                self._claim(number + 1)
            elif watch.lives and time.monotonic() >= until_s:
                raise RunHeldError(
                    f"{self._out}: another run writes here: {_say(holder)}. Wait for "
                    "it or end it, or give this run another --out"
                )
            else:
                time.sleep(POLL_S)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Let go; at once for whoever waits."""
        self._left.set()
        self._thread.join()
        temporary = self._path.with_suffix(".left")
        try:
            temporary.write_text("{}", encoding="utf-8")
            temporary.replace(self._path)
        except OSError as failure:  # as on a full disk; what the run ended with is to be heard
            logger.warning("%s: %s; the claim is removed instead", self._path, failure)
            self._remove(temporary, self._path)

    def _remove(self, *paths: Path) -> None:
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as failure:
                logger.warning("%s: %s; free when this process is gone", path, failure)

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._number:08d}.json"

    def _claim(self, number: int) -> None:
        path = self._folder / f"{number:08d}.json"
        try:
            with path.open("xb", buffering=0) as file:
                file.write(json.dumps(asdict(self._holder)).encode())
        except FileExistsError:
            return  # another was faster: look who
        self._number = number
        for old in self._folder.glob("*.json"):
            if old.name < path.name:
                old.unlink(missing_ok=True)

    def _beat(self) -> None:
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
                if now_s - touched_s > STALE_S - BEAT_S:  # before the next, another may follow
                    logger.error(
                        "%s: could not be held for %.0f s; this run ends, go on with --resume",
                        self._out,
                        now_s - touched_s,
                    )
                    os._exit(1)


class _Watch:
    """What is known of whether a folder's holder lives."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: tuple[int, int] | None = None  # number, time of its last touch
        self._seen_s = 0.0
        self.lives = False

    def is_free(self, number: int, holder: _Holder | None, place: str) -> bool:
        """Tell whether the next number may be claimed, as far as was seen till now."""
        if not number or holder is None:
            return True
        if holder.place == place:
            self.lives = holder.lives()
            return not self.lives
        try:
            touched_ns = (self._folder / f"{number:08d}.json").stat().st_mtime_ns
        except FileNotFoundError:
            return False  # look again
        now_s = time.monotonic()
        if self._seen != (number, touched_ns):
            self.lives = self._seen is not None and self._seen[0] == number
            self._seen, self._seen_s = (number, touched_ns), now_s
        return now_s - self._seen_s > STALE_S


def read_newest(folder: Path) -> tuple[int, _Holder | None]:
    """Return the highest number, 0 for none, and its holder: None where it has left."""
    numbers = [int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal()]
    number = max(numbers, default=0)
    try:
        plain = json.loads((folder / f"{number:08d}.json").read_text(encoding="utf-8"))
        return number, _Holder(**plain) if plain else None
    except FileNotFoundError:
        return number, None
    except (ValueError, TypeError):  # not written yet, or torn: watched like one elsewhere
        return number, _Holder("an unknown host", "", 0, 0)


def _say(holder: _Holder | None) -> str:
    assert holder is not None
    return f"process {holder.pid} on {holder.host}"
