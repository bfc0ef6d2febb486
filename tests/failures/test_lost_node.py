"""Faults 5 and 6: a node of the Ray cluster lost in mid-encode, and the head; on one host."""

import os
import signal

import pytest

from tests.support.ray_runs import NUM_TARS, add_node, list_commits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_lost_node_costs_no_more_than_the_tasks_that_it_held(
    cluster, start, assert_whole, tmp_path
):
    """The other node does the rest, without another run."""
    nodes = [add_node(cluster) for _ in range(2)]
    run = start(tmp_path / "store", "--actors", "2", address=cluster.address)
    run.wait_for_commits(2)
    cluster.remove_node(nodes[0], allow_graceful=False)
    assert run.end() == 0, run.output
    assert len(list_commits(run.store)) == NUM_TARS
    assert_whole(run.store)


def test_a_lost_head_is_a_failure_and_a_rerun_goes_on(cluster, start, assert_whole, tmp_path):
    add_node(cluster)
    run = start(tmp_path / "store", "--actors", "1", address=cluster.address)
    run.wait_for_commits(2)
    for kind in ("gcs_server", "raylet"):
        for info in cluster.head_node.all_processes[kind]:
            os.kill(info.process.pid, signal.SIGKILL)
    assert run.end() not in (0, 3), run.output
    assert len(list_commits(run.store)) < NUM_TARS
    assert_whole(run.store)
