"""Objects that a forked child renews: its parent's threads are not there, nor who holds a lock."""

import os
import weakref
from typing import Any

_objects: weakref.WeakSet[Any] = weakref.WeakSet()


def renew_in_child(thing: Any) -> None:
    """Call ``thing.renew()``, now and in every process that is forked from this one."""
    thing.renew()
    _objects.add(thing)


def _renew_all() -> None:
    for thing in list(_objects):
        thing.renew()


os.register_at_fork(after_in_child=_renew_all)
