"""Computes results in threads ahead of their consumer: in order, and bounded by bytes."""

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """A result that knows the bytes it keeps in memory."""

    @property
    def num_bytes(self) -> int: ...  # noqa: D102


Item = TypeVar("Item")
Result = TypeVar("Result", bound=Sized)


def work_ahead(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    bound_bytes: Callable[[Item], int],
    *,
    num_threads: int,
    max_bytes: int,
) -> Generator[Result, None, None]:
    """Yield ``work(item)`` for each item in order, with up to ``num_threads`` in work at a time.

    Waiting results and items in work (by ``bound_bytes``) take at most ``max_bytes`` together, but
    one item is always taken. What ``work`` or ``bound_bytes`` raises is raised in its item's turn.
    The threads end with the generator; closing it waits for the items in work.

    Raises:
        RuntimeError: the system has no more threads; those that started have ended.
    """
    with closing(_Ahead(items, work, bound_bytes, num_threads, max_bytes)) as ahead:
        for number in range(len(items)):
            yield ahead.wait_for(number)


class _Ahead(Generic[Item, Result]):
    def __init__(
        self,
        items: Sequence[Item],
        work: Callable[[Item], Result],
        bound_bytes: Callable[[Item], int],
        num_threads: int,
        max_bytes: int,
    ) -> None:
        self._items, self._work, self._bound_bytes = items, work, bound_bytes
        self._max_bytes = max_bytes
        self._num_bytes = 0  # of waiting results and items in work
        self._next = 0
        self._done: dict[int, Result | BaseException] = {}
        lock = threading.Lock()
        self._may_start = threading.Condition(lock)
        self._is_done = threading.Condition(lock)
        self._threads: list[threading.Thread] = []
        try:
            for i in range(min(num_threads, len(items))):
                thread = threading.Thread(target=self._run, name=f"ahead-{i}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:  # no more threads: those that run must end before their file
            self.close()
            raise

    def wait_for(self, number: int) -> Result:
        """Wait for a result, and return it without keeping it."""
        with self._is_done:
            while number not in self._done:
                self._is_done.wait()
            result = self._done.pop(number)
            if isinstance(result, BaseException):
                raise result
            self._num_bytes -= result.num_bytes
            self._may_start.notify_all()
            return result

    def close(self) -> None:
        """Start no more items, and wait for those in work."""
        with self._may_start:
            self._next = len(self._items)
            self._may_start.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (taken := self._start()) is not None:
            number, num_bytes = taken
            result: Result | BaseException
            try:
                result = self._work(self._items[number])
                num_more = result.num_bytes - num_bytes
            except BaseException as error:  # noqa: BLE001  # raised in ``wait_for``
                result, num_more = error, 0
            with self._is_done:
                self._finish(number, result, num_more)

    def _finish(self, number: int, result: Result | BaseException, num_more: int) -> None:
        """Store a result or an error for its item's turn; nothing starts after an error."""
        self._done[number] = result
        if isinstance(result, BaseException):
            self._next = len(self._items)
        self._num_bytes += num_more
        self._may_start.notify_all()
        self._is_done.notify()

    def _start(self) -> tuple[int, int] | None:
        """Wait until the next item may start; return its number and its bound, None at the end."""
        with self._may_start:
            while self._next < len(self._items):
                try:
                    num_bytes = self._bound_bytes(self._items[self._next])
                except BaseException as error:  # noqa: BLE001  # raised in ``wait_for``
                    self._finish(self._next, error, 0)
                    return None
                if not self._num_bytes or self._num_bytes + num_bytes <= self._max_bytes:
                    self._num_bytes += num_bytes
                    self._next += 1
                    return self._next - 1, num_bytes
                self._may_start.wait()
            return None
