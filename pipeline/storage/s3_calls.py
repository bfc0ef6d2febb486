"""Calls of a library in a thread of their own, so that a signal need not wait for their end.

None is made in a forked process: the library has threads, which would be waited for in vain.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from pipeline.storage.interface import StorageError

T = TypeVar("T")
_callers: set[int] = set()  # this process, and those that it was forked from


def refuse_forked(url: str) -> None:
    """Note that this process makes requests; StorageError if one that it was forked from did."""
    _callers.add(os.getpid())
    if len(_callers) > 1:
        raise StorageError(
            f"{url}: this process was forked from one that had made requests of an object store, "
            "whose threads a fork does not copy; start it otherwise: a DataLoader's workers with "
            'multiprocessing_context="spawn" (or "forkserver"), or read with num_workers=0'
        )


def call_apart(call: Callable[[], T]) -> Future[T]:
    """Start ``call`` in a daemon thread of its own; return its future result."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  raised to whoever waits for it
            future.set_exception(error)

    threading.Thread(target=run, name="call", daemon=True).start()
    return future


def call_interruptibly(call: Callable[[], T]) -> T:
    """Return ``call()``; in the main thread Ctrl-C leaves a call that does not return alone."""
    if threading.current_thread() is threading.main_thread():
        return call_apart(call).result()
    return call()
