"""Thread-safe LRU cache bounded by cost."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from pipeline.base.forks import renew_in_child

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def _one(value: object) -> int:
    return 1


class LruCache(Generic[Key, Value]):
    """Values by key; the least recently used go once all together cost more than ``max_cost``.

    ``cost`` gives one value's cost, by default 1. A cache arrives empty in another process.
    """

    def __init__(self, max_cost: int, cost: Callable[[Value], int] = _one) -> None:
        self.max_cost = max_cost
        self._cost_of = cost
        renew_in_child(self)

    def renew(self) -> None:
        """Begin anew, without the lock, which a thread may hold that a forked child lacks."""
        self.cost = 0
        self._lock = threading.Lock()
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get_or_make(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of ``key``; where there is none, make it and add it, whatever it costs.

        Two threads may make the value of one key at the same time: the first one stays.
        """
        value = self.get(key)
        if value is None:
            value = make()
            self._add(key, value)
        return value

    def get(self, key: Key) -> Value | None:
        """Return the value of ``key``, or None."""
        try:  # without the lock, which costs more than all else: each of the two steps is atomic
            value = self._values[key]
            self._values.move_to_end(key)
        except KeyError:  # never added, or removed by another thread between the two steps
            return None
        return value

    def put(self, key: Key, value: Value) -> None:
        """Add a value, unless there is one or it alone costs more than ``max_cost``."""
        if self._cost_of(value) <= self.max_cost:
            self._add(key, value)

    def _add(self, key: Key, value: Value) -> None:
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self.cost += self._cost_of(value)
            while self.cost > self.max_cost and len(self._values) > 1:
                self.cost -= self._cost_of(self._values.popitem(last=False)[1])

    def __len__(self) -> int:
        return len(self._values)

    def remove(self, key: Key) -> None:
        """Remove the value of ``key``, where there is one."""
        with self._lock:
            value = self._values.pop(key, None)
            if value is not None:
                self.cost -= self._cost_of(value)

    def clear(self) -> None:
        """Remove all values."""
        with self._lock:
            self._values.clear()
            self.cost = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return LruCache, (self.max_cost, self._cost_of)
