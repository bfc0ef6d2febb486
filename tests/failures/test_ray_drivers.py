"""Faults 4 and 18 on a Ray cluster: a driver killed, and two runs on one store at once."""

import signal

import pytest

from tests.support.ray_runs import NUM_TARS, list_commits, list_workers, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_kill_9_of_a_driver_leaves_no_worker_on_the_cluster(
    lasting_cluster, start, assert_whole, tmp_path
):
    run = start(tmp_path / "store", "--actors", "2", address=lasting_cluster.address)
    run.wait_for_commits(2)
    nodes = lasting_cluster.list_all_nodes()
    assert list_workers(nodes)
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    wait_until(lambda: not list_workers(nodes))
    assert len(list_commits(run.store)) < NUM_TARS
    assert_whole(run.store)


def test_two_runs_of_one_cluster_on_one_store_both_end_well(
    lasting_cluster, start, assert_whole, tmp_path
):
    runs = [
        start(tmp_path / "store", "--actors", "1", address=lasting_cluster.address)
        for _ in range(2)
    ]
    assert [run.end() for run in runs] == [0, 0], [run.output for run in runs]
    store = tmp_path / "store"
    assert len(list_commits(store)) == NUM_TARS
    assert {name.rpartition(".")[0][-5:] for name in list_commits(store)} == {".0000"}
    assert_whole(store)
