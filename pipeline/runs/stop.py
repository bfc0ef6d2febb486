"""Asking a training run to end after its step, with a checkpoint: a signal, or a file.

``OUT/stop`` asks every worker that sees ``OUT``, whoever makes it; the command makes it when it is
sent SIGTERM or SIGINT.
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
POLL_S = 0.5  # at most one look at the file in that time, which may be on a file server


class StopRequest:
    """Whether a run was asked to end; ``should_stop`` of ``fit``. Once it was, it stays so."""

    def __init__(self, out: Path) -> None:
        self._path = out / STOP
        self._asked = threading.Event()
        self._looked_s = float("-inf")

    def __call__(self) -> bool:
        """Tell whether the run was asked to end."""
        now_s = time.monotonic()
        if not self._asked.is_set() and now_s - self._looked_s >= POLL_S:
            self._looked_s = now_s
            if self._path.exists():
                self._asked.set()
        return self._asked.is_set()

    def ask(self) -> None:
        """Ask this process and every other that sees the folder."""
        self._asked.set()
        self._path.touch()

    def clear(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)


@contextmanager
def asking_on_signals(request: StopRequest) -> Iterator[None]:
    """Have the first SIGTERM or SIGINT ask a run to end, and the second interrupt it at once.

    In another thread than the main one, where Python takes no signals, this does nothing.
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
