"""What an encode run's workers are, and the stage behind them: here, and on Ray."""

import json

import numpy as np
import pytest

from pipeline.base.ray_cluster import NodeSize
from pipeline.encode.actor_pool import ActorBounds
from pipeline.encode.prepare import prepare_encode
from pipeline.encode.run import choose_workers, default_max_failures, encode_here, run_encode
from pipeline.store.commit import list_records
from pipeline.store.records import RecordTable
from pipeline.store.store import Store
from tests.support.missing import list_missing

HEAD = NodeSize(0)
G5 = NodeSize(8, 1)


def test_a_gpu_worker_has_its_share_of_the_leanest_node():
    workers = choose_workers([HEAD, NodeSize(48, 4), G5], num_tasks=99)
    assert workers.bounds == ActorBounds(5, 5)
    assert (workers.num_gpus, workers.num_decoders, workers.num_threads) == (1, 4, 2)
    assert workers.num_cpus == 6  # of 8


def test_no_gpu_waits_for_a_cpu():
    """Where a node has fewer CPUs than GPUs, or more threads are named than it has."""
    assert choose_workers([NodeSize(2, 4)], num_tasks=99).num_cpus == 0.5
    assert choose_workers([NodeSize(2, 4)], num_tasks=99).bounds == ActorBounds(4, 4)
    named = choose_workers([G5], num_tasks=99, num_threads=16, num_decoders=8)
    assert (named.num_threads, named.num_decoders, named.num_cpus) == (16, 8, 8)


def test_gpu_nodes_that_are_yet_to_come_hold_a_worker_whatever_they_have():
    workers = choose_workers([HEAD], num_tasks=99, bounds=ActorBounds(2, 16), num_gpus=1)
    assert (workers.bounds, workers.num_cpus, workers.num_gpus) == (ActorBounds(2, 16), 1, 1)


@pytest.mark.parametrize("num_gpus", [None, 1.0])
def test_an_empty_cluster_without_bounds_is_refused(num_gpus):
    with pytest.raises(
        ValueError, match=r"expected a node with . GPUs and a CPU.*--actors MIN:MAX"
    ):
        choose_workers([HEAD], num_tasks=99, num_gpus=num_gpus)


def test_half_a_gpu_a_worker_is_half_its_share():
    workers = choose_workers([G5], num_tasks=99, num_gpus=0.5)
    assert (workers.bounds, workers.num_cpus) == (ActorBounds(2, 2), 3)
    assert (workers.num_decoders, workers.num_threads) == (2, 1)


@pytest.mark.parametrize(
    ("nodes", "actors", "num_cpus"),
    [([3, 3], 2, 3), ([1, 3, 3], 2, 3), ([3, 3, 3], 4, 1), ([2], 2, 1), ([2], 5, 1), ([16], 1, 16)],
)
def test_cpu_workers_all_find_room(nodes, actors, num_cpus):
    sizes = [NodeSize(cpus) for cpus in nodes]
    workers = choose_workers(sizes, num_tasks=99, bounds=ActorBounds(actors, actors))
    assert (workers.num_cpus, workers.num_gpus) == (num_cpus, 0)
    assert workers.num_threads == max(1, num_cpus - 1)


def test_without_gpus_or_bounds_there_is_one_worker_a_core():
    workers = choose_workers([NodeSize(2), NodeSize(4)], num_tasks=99)
    assert (workers.bounds, workers.num_cpus) == (ActorBounds(6, 6), 1)


def test_failures_that_end_a_run_grow_with_it():
    assert [default_max_failures(num) for num in (0, 99, 100_000)] == [20, 20, 1020]


@pytest.fixture
def run(tmp_path, corpus_folder, spec):
    """Three tars to encode, and the store that they go to."""
    store = tmp_path / "store"
    return prepare_encode(spec, [str(corpus_folder / "*.tar")], str(store), batch=8), store


def assert_as_undisturbed(store, store_folder, read_arrays):
    ours, theirs = read_arrays(store), read_arrays(store_folder)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


def test_here_items_are_encoded_side_by_side_as_one_after_another(run, store_folder, read_arrays):
    plan, store = run
    outcomes = list(encode_here(plan.config, plan.items))
    assert {outcome.status for outcome in outcomes} == {"committed"}
    assert_as_undisturbed(store, store_folder, read_arrays)


@pytest.mark.thorough
def test_here_what_is_not_waited_for_is_given_up_and_done_by_a_rerun(
    run, store_folder, read_arrays
):
    plan, store = run
    config, tasks = plan.config, [item.task for item in plan.items]
    outcomes = encode_here(config, plan.items)
    first = next(outcomes)
    outcomes.close()
    left = list_missing(Store.open(str(store)), config.latents, config.features, tasks)
    assert first.task not in {item.task.id for item in left}
    assert {outcome.status for outcome in encode_here(config, left)} <= {"committed"}
    assert_as_undisturbed(store, store_folder, read_arrays)


def test_a_run_leaves_a_table_of_its_records(run, monkeypatch):
    monkeypatch.setattr("pipeline.store.records.MIN_KEPT", 1)
    plan, store = run
    run_encode(plan, metrics_path=None, actors=ActorBounds(0, 0))
    for layer in (plan.config.latents, plan.config.features):
        records = list_records(Store.open(str(store)).storage, layer.folder).values()
        assert RecordTable(Store.open(str(store)), layer.folder).count_unread(list(records)) == 0


@pytest.mark.slow
def test_on_ray_two_actors_encode_what_one_process_does(run, store_folder, read_arrays, tmp_path):
    plan, store = run
    totals = run_encode(
        plan, metrics_path=tmp_path / "metrics.jsonl", actors=ActorBounds(1, 2), num_threads=1
    )
    assert totals.tasks == {"committed": 3}
    assert_as_undisturbed(store, store_folder, read_arrays)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["status"], last["done"], last["total"]) == ("done", 3, 3)
    assert last["actors_max"] == 2
