"""Faults 5 and 6: a node of the Ray cluster lost in mid-encode, and the head; on one host."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from ray.cluster_utils import Cluster

from pipeline.encode import EncodeStage, prepare_encode
from pipeline.scenes import write_corpus
from pipeline.spec import FeaturesSpec, LatentsSpec, Spec
from pipeline.store import Store
from pipeline.verify import verify_store

ROOT = Path(__file__).parents[2]
NUM_TARS = 12

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, ldm_folder):
    """Small tars and a spec of one block at one timestep."""
    folder = tmp_path_factory.mktemp("cluster-corpus")
    write_corpus(folder, split="train", num_images=4 * NUM_TARS, images_per_tar=4, size_px=64)
    spec = Spec(
        latents=LatentsSpec(model=str(ldm_folder), size=64),
        features=FeaturesSpec(blocks=(6,), timesteps=(300,)),
    )
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    return folder, spec


@pytest.fixture(scope="module")
def undisturbed(inputs, read_arrays):
    folder, spec = inputs
    store = folder / "undisturbed"
    run = prepare_encode(spec, [str(folder / "*.tar")], str(store), batch=4)
    stage = EncodeStage(run.config)
    assert {stage.encode(item).status for item in run.items} == {"committed"}
    return read_arrays(store)


@pytest.fixture
def cluster():
    """A head that runs no work and two nodes of three cores each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def start_encode(inputs, store, *, address):
    folder = inputs[0]
    command = [
        sys.executable, "-m", "jobs", "encode", "--corpus", str(folder / "*.tar"), "--store",
        str(store), "--spec", str(folder / "spec.yaml"), "--actors", "2", "--threads", "1",
        "--batch", "4", "--metrics", str(store.with_suffix(".jsonl")),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    if address:
        environment["RAY_ADDRESS"] = address
    with store.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def wait_for_commits(process, store, num, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while len(list(store.glob("features-*/commits/*.json"))) < num:
        assert process.poll() is None, store.with_suffix(".log").read_text()
        assert time.monotonic() < deadline, "no commit in time"
        time.sleep(0.02)


def assert_complete(store, undisturbed, read_arrays):
    ours = read_arrays(store)
    assert ours.keys() == undisturbed.keys()
    for name, values in undisturbed.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
    checks = verify_store(Store.open(str(store)))
    assert [damage for check in checks for damage in check.damage] == []


def test_a_lost_node_costs_no_more_than_the_tasks_that_it_held(
    inputs, undisturbed, cluster, read_arrays, tmp_path
):
    """The other node goes on with the rest.

    Ray may spend a task's tries in seconds, before it notices that the node is gone; the second
    pool does that task.
    """
    store = tmp_path / "store"
    nodes = [cluster.add_node(num_cpus=3) for _ in range(2)]
    process = start_encode(inputs, store, address=cluster.address)
    try:
        wait_for_commits(process, store, 2)
        cluster.remove_node(nodes[0], allow_graceful=False)
        status = process.wait(240)
    finally:
        process.kill()
    output = store.with_suffix(".log").read_text()
    assert status == 0, output
    assert len(list(store.glob("features-*/commits/*.json"))) == NUM_TARS
    again = start_encode(inputs, store, address=None)
    assert again.wait(240) == 0, store.with_suffix(".log").read_text()
    assert_complete(store, undisturbed, read_arrays)


def test_a_lost_head_is_a_failure_and_a_rerun_goes_on(
    inputs, undisturbed, cluster, read_arrays, tmp_path
):
    store = tmp_path / "store"
    cluster.add_node(num_cpus=3)
    process = start_encode(inputs, store, address=cluster.address)
    try:
        wait_for_commits(process, store, 2)
        for kind in ("gcs_server", "raylet"):
            for info in cluster.head_node.all_processes[kind]:
                os.kill(info.process.pid, signal.SIGKILL)
        status = process.wait(240)
    finally:
        process.kill()
    assert status != 0, store.with_suffix(".log").read_text()
    again = start_encode(inputs, store, address=None)
    assert again.wait(240) == 0, store.with_suffix(".log").read_text()
    assert_complete(store, undisturbed, read_arrays)
