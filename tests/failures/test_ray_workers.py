"""Faults 3, 8 and 9 on a Ray cluster: workers that are killed, hang, or die of a task each time."""

import json
import random
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.ray_runs import NUM_TARS, POISON, halt_in_mid_task, list_commits, list_workers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def nodes(lasting_cluster):
    return lasting_cluster.list_all_nodes()


@pytest.mark.parametrize("seed", [0])
def test_workers_killed_again_and_again(
    lasting_cluster, nodes, start, assert_whole, tmp_path, seed
):
    """SIGKILL, or SIGTERM as a node that is drained sends; the run goes on by itself."""
    draw = random.Random(seed)
    run = start(tmp_path / "store", "--actors", "2", address=lasting_cluster.address)
    killed = []
    for num_commits in sorted(draw.sample(range(1, NUM_TARS - 4), 4)):
        run.wait_for_commits(num_commits)
        run.wait_until(lambda: list_workers(nodes))
        worker = draw.choice(list_workers(nodes))
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM]))
            killed.append(worker.pid)
    assert run.end() == 0, run.output
    assert len(killed) == 4
    assert len(list_commits(run.store)) == NUM_TARS
    assert_whole(run.store)


def test_a_hung_worker_is_killed_and_its_tasks_are_done_by_another(
    lasting_cluster, nodes, start, assert_whole, tmp_path
):
    options = "--actors", "2", "--stall-minutes", "0.35"
    run = start(tmp_path / "store", *options, address=lasting_cluster.address)
    worker = halt_in_mid_task(run, nodes)
    assert run.end() == 0, run.output
    assert not worker.is_running()
    assert len(list_commits(run.store)) == NUM_TARS
    logs = lasting_cluster.head_node.get_logs_dir_path()
    (log,) = Path(logs).glob(f"worker-*-{worker.pid}.err")
    assert "ldznet: no progress for 21 s in task(s) scenes-train-" in log.read_text()
    assert_whole(run.store)


def test_a_worker_that_goes_on_after_anothers_commit_ends_well(
    lasting_cluster, nodes, inputs, start, writers, assert_whole, tmp_path
):
    """Halted in mid-task, overtaken by another run, then on: one winner a task, status 0."""
    run = start(tmp_path / "store", "--actors", "1", address=lasting_cluster.address)
    worker = halt_in_mid_task(run, nodes)
    status, output = writers.run(*inputs.command(run.store, "--actors", "0"))
    assert status == 0, (status, output)
    committed = {path: path.read_bytes() for path in run.store.glob("*/commits/*.json")}
    worker.send_signal(signal.SIGCONT)
    assert run.end() == 0, run.output
    assert "another run committed first" in run.output
    assert {path: path.read_bytes() for path in run.store.glob("*/commits/*.json")} == committed
    assert_whole(run.store)


def test_a_task_that_kills_its_worker_each_time_is_set_aside(
    lasting_cluster, start, assert_whole, tmp_path
):
    """All others land, though they were in flight beside it; it lands where it kills no more."""
    tars = [f"{POISON}.tar", "scenes-train-0000?.tar"]
    run = start(tmp_path / "store", "--actors", "2", address=lasting_cluster.address, tars=tars)
    assert run.end() == 3, run.output
    assert f"failed {POISON}-" in run.output
    assert "WorkerDied: no answer in" in run.output
    assert "tasks failed: 1;" in run.output
    assert len(list_commits(run.store)) == 10
    (line,) = (run.store.with_name("failed.jsonl")).read_text().splitlines()
    assert json.loads(line)["task"].startswith(POISON)
    assert_whole(run.store, tars)
