"""A bounded memory of what was made last."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def _one(value: object) -> int:
    return 1


class Recent(Generic[Key, Value]):
    """The values asked for last, up to ``max_cost`` together. Threads may share it."""

    def __init__(self, max_cost: int, cost: Callable[[Value], int] = _one) -> None:
        self.max_cost = max_cost
        self._cost_of = cost
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, Value] = OrderedDict()
        self.cost = 0

    def find(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of ``key``, by ``make`` where it is not kept."""
        try:  # without the lock, which costs more than all else: each of the two steps is atomic
            value = self._kept[key]
            self._kept.move_to_end(key)
        except KeyError:  # not kept, or let go of by another thread between them
            pass
        else:
            return value
        made = make()  # outside the lock: that two threads make the same one does no harm
        self._add(key, made)
        return made

    def peek(self, key: Key) -> Value | None:
        """Return the value of ``key``, or None where it is not kept."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key]

    def keep(self, key: Key, value: Value) -> None:
        """Keep a value made elsewhere, unless one is kept or it alone costs over ``max_cost``."""
        if self._cost_of(value) <= self.max_cost:
            self._add(key, value)

    def _add(self, key: Key, value: Value) -> None:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = value
                self.cost += self._cost_of(value)
            while self.cost > self.max_cost and len(self._kept) > 1:
                self.cost -= self._cost_of(self._kept.popitem(last=False)[1])

    def __len__(self) -> int:
        return len(self._kept)

    def forget(self, key: Key) -> None:
        """Keep a value no longer."""
        with self._lock:
            value = self._kept.pop(key, None)
            if value is not None:
                self.cost -= self._cost_of(value)

    def __getstate__(self) -> tuple[int, Callable[[Value], int]]:
        return self.max_cost, self._cost_of  # another process makes its own values

    def __setstate__(self, state: tuple[int, Callable[[Value], int]]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def clear(self) -> None:
        """Keep nothing of what is kept."""
        with self._lock:
            self._kept.clear()
            self.cost = 0
