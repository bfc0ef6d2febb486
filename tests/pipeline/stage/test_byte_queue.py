"""Queues between the stage's threads: order, bounds by bytes, and how they end."""

import threading
from threading import Condition

import pytest

from pipeline.stage.byte_queue import ByteQueue, QueueClosedError, get_any


def start(work):
    """Run in a thread; return it and the list of what it returned or raised."""
    came = []

    def run():
        try:
            came.append(work())
        except QueueClosedError as error:
            came.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, came


def test_a_put_waits_until_its_bytes_fit():
    queue = ByteQueue(10)
    queue.put("a", 4)
    queue.put("b", 6)
    thread, came = start(lambda: queue.put("c", 1))
    thread.join(0.2)
    assert thread.is_alive()
    assert queue.num_bytes == 10
    assert queue.get() == "a"
    thread.join(10)
    assert came == [None]
    assert queue.num_bytes == 7
    assert [queue.get(), queue.get()] == ["b", "c"]
    assert queue.num_bytes == 0


def test_one_item_fits_however_large():
    queue = ByteQueue(10)
    queue.put("large", 1000)
    assert queue.get() == "large"


def test_closing_ends_whoever_waits_and_drops_what_is_held():
    full, empty = ByteQueue(1), ByteQueue(1)
    full.put("a", 1)
    waiting = [start(lambda: full.put("b", 1)), start(empty.get)]
    for queue in (full, empty):
        queue.close()
    for thread, came in waiting:
        thread.join(10)
        assert isinstance(came[0], QueueClosedError)
    with pytest.raises(QueueClosedError):
        full.get()
    with pytest.raises(QueueClosedError):
        empty.put("c", 1)


def test_of_several_queues_the_chosen_one_is_served():
    changed = Condition()
    queues = [ByteQueue(10, changed=changed) for _ in range(3)]
    thread, came = start(lambda: get_any(queues, min, changed=changed))
    queues[2].put("late", 1)
    thread.join(10)
    assert came == [(2, "late")]
    queues[1].put("b", 1)
    queues[2].put("c", 1)
    seen = []

    def choose(ready):
        seen.append(list(ready))
        return ready[-1]

    assert get_any(queues, choose, changed=changed) == (2, "c")
    assert get_any(queues, choose, changed=changed) == (1, "b")
    assert seen == [[1, 2], [1]]
