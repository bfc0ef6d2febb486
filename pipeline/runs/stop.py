"""Requests that a training run ends after its step, with a checkpoint: by a signal or a file.

The file ``OUT/stop`` stops every worker that sees ``OUT``, whoever makes it; the command makes it
on SIGTERM or SIGINT.
"""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

logger = logging.getLogger(__name__)

STOP = "stop"
POLL_S = 0.5  # the file, which may be on a file server, is looked for at most so often


class StopRequest:
    """A request to end a run, which stays once it was made; ``should_stop`` of ``fit``."""

    def __init__(self, out: Path) -> None:
        self._path = out / STOP
        self._asked = threading.Event()
        self._polled_s = float("-inf")

    def __call__(self) -> bool:
        """Return whether the run was asked to end."""
        now_s = time.monotonic()
        if not self._asked.is_set() and now_s - self._polled_s >= POLL_S:
            self._polled_s = now_s
            if self._path.exists():
                self._asked.set()
        return self._asked.is_set()

    def ask(self) -> None:
        """Request the end, of this process and of every other that sees the folder."""
        self._asked.set()
        self._path.touch()

    def clear(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)


@contextmanager
def asking_on_signals(request: StopRequest) -> Iterator[None]:
    """In the block, the first SIGTERM or SIGINT asks a run to end, the second interrupts it.

    Does nothing in another thread than the main one, where Python handles no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if request():
            raise KeyboardInterrupt
        logger.warning("ending after this step, with a checkpoint; once more ends at once")
        request.ask()

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
