"""FIFO queue between threads, bounded by the bytes that it holds instead of its items."""

from collections import deque
from collections.abc import Callable, Sequence
from threading import Condition
from typing import Generic, TypeVar

T = TypeVar("T")


class QueueClosedError(RuntimeError):
    """The queue was closed: threads that put or get should end."""


class ByteQueue(Generic[T]):
    """FIFO queue of at most ``max_bytes``; ``put`` waits until there is room.

    An empty queue takes any one item, however large. Once the queue is closed every method that
    waits raises QueueClosedError. ``get_any`` waits for several queues that share ``changed``.
    """

    def __init__(self, max_bytes: int, *, changed: Condition | None = None) -> None:
        self.num_bytes = 0  # held now
        self.closed = False
        self._max_bytes = max_bytes
        self._changed = changed or Condition()
        self._items: deque[tuple[T, int]] = deque()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def is_full(self) -> bool:
        """Whether ``put`` would wait for any further bytes."""
        return self.num_bytes >= self._max_bytes

    def wait_for_room(self, num_bytes: int) -> None:
        """Wait until ``put`` would not wait; for a queue into which one thread puts."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self.closed or not self._items or self.num_bytes + num_bytes <= self._max_bytes
                )
            )
            if self.closed:
                raise QueueClosedError

    def put(self, item: T, num_bytes: int) -> None:
        """Append an item once there is room for its bytes."""
        with self._changed:  # a Condition's lock may be taken again by its holder
            self.wait_for_room(num_bytes)
            self._items.append((item, num_bytes))
            self.num_bytes += num_bytes
            self._changed.notify_all()

    def get(self) -> T:
        """Remove and return the oldest item, once there is one."""
        return get_any([self], lambda ready: 0, changed=self._changed)[1]

    def close(self) -> None:
        """Make every ``put`` and ``get`` raise, those that wait now included; drop all items."""
        with self._changed:
            self.closed = True
            self._items.clear()
            self._changed.notify_all()


def get_any(
    queues: Sequence[ByteQueue[T]], choose: Callable[[Sequence[int]], int], *, changed: Condition
) -> tuple[int, T]:
    """Remove the oldest item of one of several queues that share ``changed``, once there is one.

    ``choose`` is given the numbers of the queues that hold items, and returns one of them. Returns
    that number and the item.

    Raises:
        QueueClosedError: a queue was closed.
    """
    with changed:
        changed.wait_for(lambda: any(queue or queue.closed for queue in queues))
        if any(queue.closed for queue in queues):
            raise QueueClosedError
        number = choose([number for number, queue in enumerate(queues) if queue])
        item, num_bytes = queues[number]._items.popleft()
        queues[number].num_bytes -= num_bytes
        changed.notify_all()
        return number, item
