"""Fault 25: a training worker killed, and a node lost; the run goes on by itself, driver untouched.

Two nodes of this host, each with room for both workers: what is lost starts again on what is left.
"""

import os
import signal
import time

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.support.train_runs import PROBE, TrainRun, assert_same_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LONG = PROBE.model_copy(
    update={"num_steps": 600, "checkpoint_every": 20, "validate_every": 100, "log_every": 5}
)
OPTIONS = "--workers", "2"
WORKER = "ray::RayTrainWorker"


@pytest.fixture(scope="module")
def cluster():
    """A head with room for one worker, and two nodes with room for both each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, store_folder, cluster):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run = TrainRun(LONG, store_folder, out, *OPTIONS, address=cluster.address)
    assert run.end() == 0, run.output
    return out


def list_workers(cluster):
    """(node, process) of each training worker of the cluster."""
    found = []
    for node in cluster.list_all_nodes():
        for info in node.all_processes.get("raylet", []):
            for process in psutil.Process(info.process.pid).children(recursive=True):
                try:
                    if process.cmdline()[:1] and process.cmdline()[0].startswith(WORKER):
                        found.append((node, process))
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
    return found


def wait_for_workers(cluster, run, num=2):
    deadline = time.monotonic() + 120
    while len(found := list_workers(cluster)) < num:
        assert run.process.poll() is None, run.output
        assert time.monotonic() < deadline, f"workers: {found}"
        time.sleep(0.05)
    return found


def test_a_killed_worker_is_replaced(tmp_path, store_folder, cluster, undisturbed):
    """Twice: either of the two, whichever of them writes."""
    run = TrainRun(LONG, store_folder, tmp_path / "run", *OPTIONS, address=cluster.address)
    for number, step in enumerate((45, 150)):
        run.wait_for_step(step)
        workers = sorted(wait_for_workers(cluster, run), key=lambda found: found[1].pid)
        os.kill(workers[number][1].pid, signal.SIGKILL)
    assert run.end() == 0, run.output
    assert_same_run(run.out, undisturbed, LONG)


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(
    tmp_path, store_folder, cluster, undisturbed
):
    run = TrainRun(LONG, store_folder, tmp_path / "run", *OPTIONS, address=cluster.address)
    run.wait_for_step(65)
    node, _ = wait_for_workers(cluster, run)[0]
    assert node is not cluster.head_node
    cluster.remove_node(node, allow_graceful=False)
    assert run.end() == 0, run.output
    assert_same_run(run.out, undisturbed, LONG)


def test_sigterm_ends_both_workers_with_a_checkpoint(tmp_path, store_folder, cluster, undisturbed):
    run = TrainRun(LONG, store_folder, tmp_path / "run", *OPTIONS, address=cluster.address)
    run.wait_for_step(65)
    run.process.send_signal(signal.SIGTERM)
    assert run.end(30) == 130, run.output
    assert "The last checkpoint stays; to go on:\n  ldznet train" in run.output
    assert "Traceback" not in run.output
    done = run.count_steps()
    rest = TrainRun(LONG, store_folder, run.out, *OPTIONS, "--resume", address=cluster.address)
    assert rest.end() == 0, rest.output
    assert 65 <= done < LONG.num_steps
    assert_same_run(run.out, undisturbed, LONG)


def test_a_cluster_that_is_too_small_is_said_at_once(tmp_path, store_folder, cluster):
    out = tmp_path / "run"
    run = TrainRun(LONG, store_folder, out, "--workers", "9", address=cluster.address)
    assert run.end(120) == 2, run.output
    assert "--workers: expected room for 9 workers with 1 CPUs each" in run.output


def test_an_error_that_would_come_again_ends_the_run_at_once(tmp_path, store_folder, cluster):
    """The workers are not started again for it, and it is said as without Ray."""
    config = LONG.model_copy(update={"learning_rate": 1e12, "clip_norm": 1e12, "log_every": 1})
    run = TrainRun(config, store_folder, tmp_path / "run", *OPTIONS, address=cluster.address)
    assert run.end(120) == 1, run.output
    assert "failed: FloatingPointError: step " in run.output
    assert "taken back" not in run.output
