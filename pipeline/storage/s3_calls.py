"""Calls of a library in a thread of their own, so that a signal need not wait for their end."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


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
