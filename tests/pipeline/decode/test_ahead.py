"""Work ahead of its reader: in order, several at once, bounded by bytes, ended when closed."""

import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.decode.ahead import work_ahead

LIMIT_S = 60  # for what happens at once, or never


@dataclass(frozen=True)
class Answer:
    item: int
    num_bytes: int


class Work:
    """Work whose items wait to be let go; says which have begun."""

    def __init__(self, num_bytes=10, open_from=0):
        self.begun = {i: threading.Event() for i in range(20)}
        self.may_end = {i: threading.Event() for i in range(20)}
        self.num_bytes = num_bytes
        for i in range(open_from, 20):
            self.may_end[i].set()

    def __call__(self, item):
        self.begun[item].set()
        assert self.may_end[item].wait(LIMIT_S)
        return Answer(item, self.num_bytes)

    def count_begun(self):
        return sum(event.is_set() for event in self.begun.values())


def start(work, *, num_threads, max_bytes, bound=10, num_items=20):
    return work_ahead(
        range(num_items), work, lambda item: bound, num_threads=num_threads, max_bytes=max_bytes
    )


def test_results_come_in_order_whatever_ends_first():
    work = Work(open_from=1)
    answers = start(work, num_threads=3, max_bytes=10**9)

    def let_the_first_end():
        assert work.begun[19].wait(LIMIT_S)
        work.may_end[0].set()

    thread = threading.Thread(target=let_the_first_end)
    thread.start()
    assert [answer.item for answer in answers] == list(range(20))
    thread.join()
    assert list(start(work, num_threads=3, max_bytes=1, num_items=0)) == []


def test_so_many_are_in_work_at_once_and_no_more():
    work = Work(open_from=20)
    answers = start(work, num_threads=3, max_bytes=10**9)
    thread = threading.Thread(target=lambda: list(answers))
    thread.start()
    assert all(work.begun[i].wait(LIMIT_S) for i in range(3))
    assert not work.begun[3].wait(0.05)
    for event in work.may_end.values():
        event.set()
    thread.join()


@pytest.mark.parametrize(("num_bytes", "ahead"), [(10, 3), (1, 6), (30, 2)])
def test_what_waits_is_bounded_by_its_bytes(num_bytes, ahead):
    """30 bytes at a bound of 10 each: what is done counts as it is, what begins as its bound."""
    work = Work(num_bytes)
    answers = start(work, num_threads=1, max_bytes=30)
    assert next(answers).item == 0
    last = ahead if num_bytes != 1 else 20
    done = [i for i in range(1, 20) if work.begun[i].wait(0.05)]
    if num_bytes == 10:
        assert done == [1, 2, 3]
    elif num_bytes == 30:
        assert done == [1]
    else:
        assert len(done) == min(last, 19)
    assert [answer.item for answer in answers] == list(range(1, 20))


def test_one_is_taken_however_large():
    work = Work(num_bytes=100)
    answers = start(work, num_threads=4, max_bytes=1, bound=1000)
    assert [answer.item for answer in answers] == list(range(20))


def test_an_error_is_raised_in_its_turn_and_ends_the_threads():
    before = threading.active_count()

    def work(item):
        if item == 2:
            raise ValueError("two")
        return Answer(item, 1)

    answers = start(work, num_threads=2, max_bytes=1000)
    assert [next(answers).item for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(answers)
    assert threading.active_count() == before


def test_a_close_waits_for_what_is_in_work_and_begins_no_more():
    work = Work(open_from=1)
    work.may_end[0].set()
    work.may_end[2].clear()
    before = threading.active_count()
    answers = start(work, num_threads=1, max_bytes=1000)
    assert next(answers).item == 0
    assert work.begun[2].wait(LIMIT_S)
    closer = threading.Thread(target=answers.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    work.may_end[2].set()
    closer.join()
    assert threading.active_count() == before
    assert work.count_begun() == 3


def test_an_error_of_a_bound_is_raised_in_its_turn():
    def bound(item):
        if item == 2:
            raise ValueError("no bound")
        return 1

    before = threading.active_count()
    answers = work_ahead(
        range(4), lambda item: Answer(item, 1), bound, num_threads=2, max_bytes=1000
    )
    assert [next(answers).item for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="no bound"):
        next(answers)
    assert threading.active_count() == before


def test_a_thread_that_cannot_start_ends_those_that_did(monkeypatch):
    work = Work()
    before = threading.active_count()
    started, start_thread = [], threading.Thread.start

    def start_one(thread):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start_thread(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        next(start(work, num_threads=3, max_bytes=1))  # it waits for room, for ever
    assert threading.active_count() == before
    assert not started[0].is_alive()


def test_a_generator_that_is_left_open_does_not_keep_the_process():
    """Its threads wait for room when the interpreter ends, and nothing closes it."""
    code = (
        "from types import SimpleNamespace as Answer\n"
        "from pipeline.decode.ahead import work_ahead\n"
        "left = work_ahead(range(9), lambda i: Answer(num_bytes=1), lambda i: 1,\n"
        "                  num_threads=3, max_bytes=2)\n"
        "next(left)\n"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], cwd=root, timeout=LIMIT_S, check=True)
