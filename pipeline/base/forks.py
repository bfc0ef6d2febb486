"""Objects that a forked child renews: its parent's threads are not there, nor who holds a lock."""

import os
import weakref
from typing import Protocol


class Renewable(Protocol):
    """What holds locks or threads."""

    def renew(self) -> None:
        """Take new ones, and forget what a thread may have left half done."""


_objects: weakref.WeakSet[Renewable] = weakref.WeakSet()


def renew_in_child(thing: Renewable) -> None:
    """Have ``thing.renew`` called in every process that is forked from this one."""
    _objects.add(thing)


def _renew_all() -> None:
    for thing in list(_objects):
        thing.renew()


os.register_at_fork(after_in_child=_renew_all)
