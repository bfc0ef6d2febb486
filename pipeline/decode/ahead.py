"""Computes results in threads ahead of their consumer: in order, and bounded by bytes."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Protocol, TypeVar


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
    one item is always taken. What ``work`` or ``bound_bytes`` raises is raised in its item's turn,
    and no item starts after it. The threads end with the generator; closing it waits for the items
    in work.

    Raises:
        RuntimeError: the system has no more threads; those that started have ended.
    """
    changed = threading.Condition()  # guards the three below
    num_started = 0
    num_bytes = 0  # of waiting results and items in work
    ended = False

    def end() -> None:
        nonlocal ended
        with changed:
            ended = True
            changed.notify_all()

    def add_bytes(num_more: int) -> None:
        nonlocal num_bytes
        with changed:
            num_bytes += num_more
            changed.notify_all()

    def run(number: int, item: Item) -> Result:
        nonlocal num_started
        try:
            with changed:
                changed.wait_for(lambda: ended or num_started == number)
                bound = bound_bytes(item)
                changed.wait_for(lambda: ended or not num_bytes or num_bytes + bound <= max_bytes)
                if ended:
                    raise CancelledError
                num_started += 1
                add_bytes(bound)
            result = work(item)
        except BaseException:
            end()
            raise
        add_bytes(result.num_bytes - bound)
        return result

    def wait_for_next() -> Result:
        result = futures.popleft().result()
        add_bytes(-result.num_bytes)
        return result

    pool = ThreadPoolExecutor(num_threads, "ahead")
    try:
        futures: deque[Future[Result]] = deque()
        for number, item in enumerate(items):
            futures.append(pool.submit(run, number, item))
        while futures:
            yield wait_for_next()
    finally:
        end()
        pool.shutdown(cancel_futures=True)
