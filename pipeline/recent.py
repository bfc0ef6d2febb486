"""A bounded memory of what was made last."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """The values asked for last, up to ``max_cost`` together. Threads may share it."""

    def __init__(self, max_cost: int, cost: Callable[[Value], int] = lambda value: 1) -> None:
        self.max_cost = max_cost
        self._cost_of = cost
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, Value] = OrderedDict()
        self.cost = 0

    def find(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of ``key``, by ``make`` where it is not kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = make()  # outside the lock: that two threads make the same one does no harm
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self.cost += self._cost_of(made)
            while self.cost > self.max_cost and len(self._kept) > 1:
                self.cost -= self._cost_of(self._kept.popitem(last=False)[1])
        return made

    def forget(self, key: Key) -> None:
        """Keep a value no longer."""
        with self._lock:
            value = self._kept.pop(key, None)
            if value is not None:
                self.cost -= self._cost_of(value)

    def clear(self) -> None:
        """Keep nothing of what is kept."""
        with self._lock:
            self._kept.clear()
            self.cost = 0
