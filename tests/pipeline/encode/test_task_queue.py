"""What is tried again and when a run ends: a queue over passes that a test answers, without Ray."""

import itertools
from collections import Counter

import pytest

from pipeline.corpus.tasks import Task
from pipeline.encode.task_queue import GIVE_UP_S, MAX_TRIES, MOVE_S, TaskQueue
from pipeline.stage.work import TaskOutcome, WorkItem

PAUSE_S = 20.0  # that a node at fault takes for each answer


class Cluster:
    """Nodes with a worker each, which answer a pass's items in turn.

    ``faulty`` nodes answer with a fault of theirs, others what ``answers`` has for a task, in turn,
    and "committed" after that.
    """

    def __init__(self, nodes=("a", "b"), *, faulty=(), at_work=None, answers=()):
        self.nodes, self.faulty = list(nodes), set(faulty)
        self.max_workers = at_work or len(self.nodes)
        self.answers = {task: iter(given) for task, given in dict(answers).items()}
        self.at_work = []
        self.passes = []  # the tasks of each, and the nodes that it was to avoid
        self.now_s = 0.0

    def list_at_work(self):
        return self.at_work

    def has_others(self, names):
        return bool(set(self.nodes) - set(names))

    def encode(self, items, avoided):
        self.passes.append(([item.task.id for item in items], tuple(avoided)))
        self.at_work = [n for n in self.nodes if n not in avoided][: self.max_workers]
        for item, node in zip(items, itertools.cycle(self.at_work), strict=False):
            yield self.answer(item.task.id, node)

    def answer(self, task, node):
        if node in self.faulty:
            self.now_s += PAUSE_S
            return outcome(task, "node", node)
        self.now_s += 1.0
        return outcome(task, next(self.answers.get(task, iter(())), "committed"), node)


def outcome(task, cause, node):
    if cause == "committed":
        return TaskOutcome(task, "committed", node=node)
    return TaskOutcome(task, "failed", error=f"{cause} of {node}", cause=cause, node=node)


def make_queue(cluster, num=8, *, max_failures=3):
    items = [WorkItem(Task(f"t{i}", f"file:///{i}.tar", 1), None, None) for i in range(num)]
    return TaskQueue(items, cluster.encode, cluster, max_failures, clock=lambda: cluster.now_s)


def run(queue):
    """The statuses of each task, in their order."""
    found = {}
    for told in queue.run():
        found.setdefault(told.task, []).append(told.status)
    return found


def test_without_faults_there_is_one_pass():
    cluster = Cluster()
    assert run(make_queue(cluster)) == {f"t{i}": ["committed"] for i in range(8)}
    assert len(cluster.passes) == 1


def test_what_a_node_failed_another_does_and_no_worker_starts_on_the_faulty_one():
    cluster = Cluster(faulty="b")
    found = run(make_queue(cluster, max_failures=0))
    assert {tuple(found[f"t{i}"]) for i in (0, 2, 4, 6)} == {("committed",)}
    assert {tuple(found[f"t{i}"]) for i in (1, 3, 5, 7)} == {("again", "committed")}
    assert cluster.passes[1:] == [(["t1", "t3", "t5", "t7"], ("b",))]


def test_a_node_that_works_again_is_not_avoided():
    cluster = Cluster(faulty="b")
    queue = make_queue(cluster)
    for told in queue.run():
        if told.node == "b":
            cluster.faulty = set()
    assert cluster.passes[1:] == [(["t1"], ())]


def test_workers_that_are_all_on_faulty_nodes_are_moved(caplog):
    """One worker, two nodes: it would hold the whole queue for hours."""
    cluster = Cluster(faulty="a", at_work=1)
    found = run(make_queue(cluster, num=50))
    tried = int(MOVE_S / PAUSE_S) + 2
    assert [tuple(f) for f in found.values()].count(("again", "committed")) == tried
    assert {statuses[-1] for statuses in found.values()} == {"committed"}
    (_, first), (tasks, second) = cluster.passes
    assert (first, second) == ((), ("a",))
    assert "all workers are on nodes at fault: they start anew on others" in caplog.text
    assert tasks == [*(f"t{i}" for i in range(tried, 50)), *(f"t{i}" for i in range(tried))]


def test_where_no_node_works_the_run_ends_and_says_so():
    """In bounded time, though the queue is long."""
    cluster = Cluster(faulty="ab")
    queue = make_queue(cluster, num=1000)
    found = run(queue)
    assert queue.stopped == "every node with a worker is at fault, as by node of b"
    assert GIVE_UP_S < cluster.now_s < GIVE_UP_S + 4 * PAUSE_S
    assert {tuple(statuses) for statuses in found.values()} == {("again", "failed")}
    assert len(found) < 20, "what was not tried is not failed"


def test_a_task_that_every_node_fails_is_failed_after_some_tries():
    cluster = Cluster("a", answers={"t1": ["node"] * 9})
    found = run(make_queue(cluster, num=3))
    assert found["t1"] == ["again"] * (MAX_TRIES["node"] - 1) + ["failed"]
    assert found["t0"] == found["t2"] == ["committed"]


def test_what_the_storage_failed_is_tried_once_more_at_the_end():
    cluster = Cluster(answers={"t1": ["storage"], "t2": ["storage", "storage"]})
    found = run(make_queue(cluster))
    assert (found["t1"], found["t2"]) == (["again", "committed"], ["again", "failed"])
    assert [tasks for tasks, _ in cluster.passes[1:]] == [["t1", "t2"]]


def test_a_storage_that_is_gone_ends_the_run():
    """It would fail each of a million tasks, after minutes of patience each."""
    answers = {f"t{i}": ["storage"] * 2 for i in range(100)}
    queue = make_queue(Cluster(answers=answers), num=100)
    found = run(queue)
    assert "too many tasks failed (--max-failures)" in queue.stopped
    assert list(found.values()) == [["again", "failed"]] * 4


@pytest.mark.parametrize("num_failed", [3, 4])
def test_more_failures_than_are_allowed_end_the_run(num_failed):
    cluster = Cluster(answers={f"t{i}": ["task"] for i in range(num_failed)})
    queue = make_queue(cluster)
    found = run(queue)
    assert bool(queue.stopped) == (num_failed > 3)
    assert len(found) == (8 if num_failed == 3 else 4)


def test_changed_tars_fail_and_end_no_run():
    cluster = Cluster(answers={f"t{i}": ["changed"] for i in range(6)})
    queue = make_queue(cluster, max_failures=0)
    assert Counter(status for (status,) in run(queue).values()) == {"failed": 6, "committed": 2}
    assert queue.stopped == ""


def test_faults_are_told_once_and_their_end_too(caplog):
    cluster = Cluster(faulty="b")
    for told in make_queue(cluster).run():
        if told.task == "t5":
            cluster.faulty = set()
    assert [record.getMessage() for record in caplog.records] == [
        "node b is at fault: node of b",
        "node b works again",
    ]
