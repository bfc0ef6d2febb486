"""The pool of actors: bounds, order, calls at once, and what becomes of tasks that kill workers."""

import logging
import os
import queue
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.base.ray_cluster import ActorWatch, NodeSize, list_nodes, ray_running
from pipeline.corpus.tasks import Task
from pipeline.encode import actor_pool
from pipeline.encode.actor_pool import (
    ActorBounds,
    ActorPool,
    order_items,
    pack_item,
    pack_outcome,
    run_items,
    unpack_item,
)
from pipeline.encode.run import end_on_sigterm
from pipeline.stage.work import TaskOutcome, WorkItem
from pipeline.store.commit import Marks


@pytest.mark.parametrize(
    ("text", "bounds"), [("16", (16, 16)), ("2:16", (2, 16)), ("3:3", (3, 3)), ("0", (0, 0))]
)
def test_bounds_are_read(text, bounds):
    assert ActorBounds.parse(text) == ActorBounds(*bounds)


@pytest.mark.parametrize("text", ["", "-1", "4:2", "0:4", "2:", ":4", "1:2:3", "all", "1.5", "0:0"])
def test_other_bounds_are_refused(text):
    with pytest.raises(ValueError, match=r"actors: expected N, or MIN:MAX .* such as 16 or 2:16"):
        ActorBounds.parse(text)


def make_items(sizes):
    return [
        WorkItem(Task(f"task-{i:05d}", f"file:///corpus/{i}.tar", size), None, None)
        for i, size in enumerate(sizes)
    ]


def test_an_item_is_the_same_behind_the_way_to_its_actor():
    marks = Marks(mtime="1", etag="abc")
    task = Task("a-1", "file:///a.tar", 5, 1, 2, below="a.tar", marks=marks, fault="broken")
    item = WorkItem(task, 0, None, next_features=2)
    row = pack_item(item)
    assert unpack_item({name: [value] for name, value in row.items()}) == item


def test_the_largest_come_first_and_every_item_once():
    items = make_items([1, 10**9, 3, 10**6, 2 * 10**9, 0, 10**6])
    ordered = [item.task.num_bytes for item in order_items(items, seed=1)]
    assert ordered[:2] == [2 * 10**9, 10**9]
    assert ordered[2:4] == [10**6, 10**6]
    assert sorted(ordered) == sorted(item.task.num_bytes for item in items)


def test_within_a_factor_of_two_each_seed_has_an_order_of_its_own():
    items = make_items([1000 + i for i in range(24)] + [5])
    orders = [[item.task.id for item in order_items(items, seed)] for seed in range(8)]
    assert len({tuple(order) for order in orders}) == 8
    assert {order[-1] for order in orders} == {"task-00024"}
    assert orders[3] == [item.task.id for item in order_items(items, 3)]
    firsts = Counter(order[0] for order in orders)
    assert max(firsts.values()) <= 4


def test_a_node_holds_as_many_actors_as_its_scarcest_resource():
    assert NodeSize(8, 4).count_actors(2, 1) == 4
    assert NodeSize(8, 4).count_actors(3, 1) == 2
    assert NodeSize(8, 4).count_actors(1, 0) == 8
    assert NodeSize(8).count_actors(1, 1) == 0
    assert NodeSize(1, 1).count_actors(0.1, 0.1) == 10


# --- on Ray: actors that do what their task's URL says -------------------------------------------


class Obedient:
    """Answers each task; a URL may have it meet another call, or end its process."""

    meeting = threading.Barrier(2)

    def __init__(self, folder):
        self._folder = Path(folder)
        end_on_sigterm(lambda: None)
        self._write("started")

    def _write(self, text):
        with (self._folder / "log").open("a") as file:
            file.write(f"{os.getpid()} {text}\n")

    def __call__(self, batch):
        item = unpack_item(batch)
        self._write(f"begin {item.task.id}")
        word = item.task.url.rsplit("/", 1)[1]
        first_time = self._folder / f"{item.task.id}-once"
        if word == "slow-meet" and not first_time.exists():
            first_time.touch()
            time.sleep(600)
        if word in ("meet", "slow-meet"):
            self.meeting.wait(60)
        if word == "poison":
            time.sleep(0.3)  # the others are in flight by now
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "term" and not (self._folder / "once").exists():
            (self._folder / "once").touch()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)  # as a task of minutes: Ray's own handler waits for it
        if word == "hang":
            time.sleep(600)
        if word in ("slow", "term"):
            time.sleep(0.6)
        self._write(f"end {item.task.id}")
        return pack_outcome(TaskOutcome(task=item.task.id, status="committed"))


def make_words(words):
    return [
        WorkItem(Task(f"t{i}-{word}", f"file:///{word}", 1), None, None)
        for i, word in enumerate(words)
    ]


def read_log(folder):
    return [line.split() for line in (folder / "log").read_text().splitlines()]


@pytest.fixture(scope="module")
def local_ray():
    with ray_running(num_cpus=3):
        yield


def make_pool(folder, **more):
    given = {"bounds": ActorBounds(1, 1), "in_flight": 2, "num_cpus": 1, **more}
    return ActorPool(actor=Obedient, arguments=(str(folder),), **given)


@pytest.mark.slow
def test_a_pool_grows_onto_a_node_that_joins(tmp_path):
    """Two actors at most, room for one: the second starts when a node has come.

    Before any test with ``local_ray``, which this would run on.
    """
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_ADDRESS", cluster.address)
            with ray_running():
                pool = make_pool(tmp_path, bounds=ActorBounds(1, 2), in_flight=2, num_cpus=1)
                assert pool.count_room(list_nodes()) == 1
                outcomes = []
                for outcome in run_items(pool, make_words(["slow"] * 120), seed=0):
                    outcomes.append(outcome)
                    if len(outcomes) == 4:
                        cluster.add_node(num_cpus=1)
    finally:
        cluster.shutdown()
        ray.shutdown()
    ended = Counter(line[0] for line in read_log(tmp_path) if line[1] == "end")
    assert len(outcomes) == 120
    assert len(ended) == 2, "the actor on the new node did its part"


@pytest.mark.thorough
def test_two_items_of_one_actor_are_in_flight_at_once(local_ray, tmp_path):
    """Each waits until the other has begun; one after the other they would wait for ever."""
    outcomes = list(run_items(make_pool(tmp_path), make_words(["meet", "meet"]), seed=0))
    assert [outcome.status for outcome in outcomes] == ["committed"] * 2
    assert len({line[0] for line in read_log(tmp_path)}) == 1


@pytest.mark.thorough
def test_actors_that_are_alive_are_counted_with_their_nodes(local_ray, tmp_path, monkeypatch):
    """Two rounds of one call, since the thread counts now and then."""
    monkeypatch.setattr("pipeline.base.ray_cluster.WATCH_S", 0.1)
    counted = queue.Queue()
    with ActorWatch(counted.put) as watch:
        for _ in run_items(make_pool(tmp_path), make_words(["slow"] * 2), seed=0):
            while counted.get(timeout=60) == 0:
                pass
            assert watch.count() == 1
            assert watch.nodes == (ray.get_runtime_context().get_node_id(),)
            break


@pytest.mark.slow
def test_a_killer_is_set_aside_and_takes_no_other_along(local_ray, tmp_path):
    """All innocents land, though they were in flight beside it each time that it struck."""
    pool = make_pool(tmp_path, in_flight=4, window=4)  # so that rounds and windows meet
    items = make_words(["slow", "poison", "slow", "slow", "plain", "plain"])
    outcomes = list(run_items(pool, items, seed=3))
    assert sorted(o.task for o in outcomes) == sorted(i.task.id for i in items)
    failed = [outcome for outcome in outcomes if outcome.status != "committed"]
    assert [outcome.task for outcome in failed] == ["t1-poison"]
    assert "no answer in 8 tries" in failed[0].error
    begun = Counter(line[2] for line in read_log(tmp_path) if line[1] == "begin")
    assert begun["t1-poison"] == sum(round_.retries + 1 for round_ in pool.rounds)


@pytest.mark.thorough
def test_a_pool_quietens_ray_data_s_console_alone(local_ray, caplog):
    """pytest gives its handler to each logger that does not propagate, and that hears us too."""
    handlers = logging.getLogger("ray.data").handlers
    assert caplog.handler in handlers
    actor_pool._set_context(actor_pool.ALONE[0])
    levels = {type(handler).__name__: handler.level for handler in handlers}
    assert levels["PlainRayHandler"] == logging.ERROR
    assert caplog.handler.level == logging.NOTSET
    logging.getLogger("pipeline.encode.actor_pool").warning("heard")
    assert "heard" in caplog.text


@pytest.mark.slow
def test_sigterm_ends_a_worker_at_once_and_its_items_are_tried_again(local_ray, tmp_path):
    items = make_words(["term", "slow", "plain"])
    outcomes = list(run_items(make_pool(tmp_path), items, seed=0))
    assert {outcome.status for outcome in outcomes} == {"committed"}
    assert len(outcomes) == len(items)
    lines = [line[1:] for line in read_log(tmp_path)]
    assert lines.count(["started"]) == 2
    assert lines.count(["begin", "t0-term"]) == 2
    assert lines.count(["end", "t0-term"]) == 1, "the first call was not waited for"


@pytest.mark.slow
def test_what_patience_cuts_off_goes_on_as_it_was(local_ray, tmp_path, monkeypatch):
    """As when a worker waits for a node that is gone for good, with its calls in hand.

    The two of the second time meet: each alone in its worker would wait for the other for ever.
    """
    impatient = actor_pool.Round(in_flight=2, retries=0, patience_s=25.0)
    monkeypatch.setattr(ActorPool, "rounds", (impatient,))
    items = make_words(["plain", "slow-meet", "slow-meet"])
    outcomes = list(run_items(make_pool(tmp_path), items, seed=0))
    assert sorted(outcome.task for outcome in outcomes) == sorted(item.task.id for item in items)
    assert {outcome.status for outcome in outcomes} == {"committed"}


@pytest.mark.slow
def test_a_task_that_hangs_is_given_up_and_keeps_no_other(local_ray, tmp_path, monkeypatch):
    """With one worker for both, whichever comes first."""
    impatient = actor_pool.Round(in_flight=1, retries=0, patience_s=30.0)
    monkeypatch.setattr(ActorPool, "rounds", (impatient,))
    items = make_words(["hang", "plain"])
    outcomes = {o.task: o.status for o in run_items(make_pool(tmp_path), items, seed=0)}
    assert outcomes == {"t0-hang": "failed", "t1-plain": "committed"}
    begun = [line[2] for line in read_log(tmp_path) if line[1] == "begin"]
    # Once before the other task ended, if it came first, and once after it; then in vain.
    assert begun.count("t0-hang") - actor_pool.MAX_FRUITLESS in (1, 2)
