"""A node of a cluster whose disk is full: the other does its tasks, in the same run."""

import functools
import http.server
import json
import threading

import numpy as np
import pytest

from tests.support.ray_runs import add_node, list_commits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NUM_TARS = 12


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def corpus(inputs):
    """The URLs of tars that a server on loopback has, so that each is copied to TMPDIR."""
    handler = functools.partial(QuietHandler, directory=inputs.folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/scenes-train-000{{00..{NUM_TARS - 1}}}.tar"
        server.shutdown()


def read_metrics(store):
    return json.loads(store.with_suffix(".jsonl").read_text().splitlines()[-1])


def test_a_node_with_a_full_disk_costs_no_task(
    cluster, start, corpus, inputs, small_disk, read_arrays, tmp_path
):
    """Both have a worker, and the one that fails each task at once is not given them all."""
    add_node(cluster)
    add_node(cluster, env_vars={"TMPDIR": str(small_disk(8192))})
    run = start(
        *(tmp_path / "store", "--actors", "2", "--corpus", corpus),
        address=cluster.address, tars=(),
    )  # fmt: skip
    assert run.end() == 0, run.output
    assert len(list_commits(run.store)) == NUM_TARS
    assert "is at fault: NodeError: [Errno 28]" in run.output
    assert not run.store.with_name("failed.jsonl").exists()
    last = read_metrics(run.store)
    assert (last["status"], last["tasks"], last["again"]) == ("done", {"committed": NUM_TARS}, 0)
    for name, values in read_arrays(run.store).items():
        np.testing.assert_array_equal(values, inputs.expected[name], err_msg=name)


def test_where_every_disk_is_full_the_run_ends_and_says_why(
    cluster, start, corpus, small_disk, tmp_path
):
    node = add_node(cluster, env_vars={"TMPDIR": str(small_disk(8192))})
    run = start(
        *(tmp_path / "store", "--actors", "1", "--corpus", corpus),
        address=cluster.address, tars=(),
    )  # fmt: skip
    assert run.end() == 3, run.output
    assert list_commits(run.store) == set()
    assert "stopped: every node with a worker is at fault, as by NodeError: [Er" in run.output
    assert "Traceback" not in run.output, "Ray Data's thread ended before Ray"
    assert read_metrics(run.store)["status"] == "stopped"
    lines = run.store.with_name("failed.jsonl").read_text().splitlines()
    assert {json.loads(line)["cause"] for line in lines} == {"node"}
    assert {json.loads(line)["ray_node"] for line in lines} == {node.node_id}
