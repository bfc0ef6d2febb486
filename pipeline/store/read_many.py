"""Reading many small files at once, by threads: a request's latency is what each costs."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

NUM_READERS = 32
_MAX_HANDED = 64

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_many(
    read: Callable[[Item], Result], items: Sequence[Item], *, at_once: int
) -> Iterator[list[Result]]:
    """Yield ``read`` of all items in order, lists of up to ``at_once``; raises what it raises.

    A thread takes some items at once: handing over each alone costs more than a local read.
    """
    size = min(max(min(len(items), at_once) // (4 * NUM_READERS), 1), _MAX_HANDED)

    def read_some(some: Sequence[Item]) -> list[Result]:
        return [read(item) for item in some]

    with ThreadPoolExecutor(NUM_READERS) as pool:
        for start in range(0, len(items), at_once):
            now = items[start : start + at_once]
            parts = pool.map(read_some, [now[at : at + size] for at in range(0, len(now), size)])
            yield [result for part in parts for result in part]
