"""``ldznet encode`` on a Ray cluster of several nodes of this host, and its workers' processes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from ray.cluster_utils import Cluster

from pipeline.scenes.scene import write_corpus
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec
from pipeline.store.store import Store
from pipeline.upkeep.gc import list_orphans, remove_orphans
from pipeline.upkeep.verify import verify_store
from tests.support.stray_files import assert_no_stray_file

ROOT = Path(__file__).parents[2]
NUM_TARS = 24
POISON = "poison-00000"  # the stem of a tar that kills its workers where ``POISONED`` is set
POISONED = {"LDZNET_FAILPOINTS": f"shard.opened[*/data/{POISON}-*]=kill"}
ACTOR = "ray::MapWorker(MapBatches(_EncodeActor))"
TIMEOUT_S = 240


SCENES = ("scenes-*.tar",)


@dataclass(frozen=True)
class Inputs:
    """Small tars, a spec of one block at one timestep, and what an undisturbed run stores."""

    folder: Path
    expected: dict[str, np.ndarray]

    def command(self, store, *options, tars=SCENES):
        return [
            "encode", *(word for glob in tars for word in ("--corpus", str(self.folder / glob))),
            "--store", str(store), "--spec", str(self.folder / "spec.yaml"), "--threads", "1",
            "--batch", "4", "--metrics", str(store.with_suffix(".jsonl")), *options,
        ]  # fmt: skip

    def list_tars(self, tars):
        """The stems of the tars that some globs match."""
        return {path.stem for glob in tars for path in self.folder.glob(glob)}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, ldm_folder, writers, read_arrays):
    folder = tmp_path_factory.mktemp("cluster-corpus")
    write_corpus(folder, split="train", num_images=3 * NUM_TARS + 3, images_per_tar=3, size_px=64)
    max(folder.glob("*.tar")).rename(folder / f"{POISON}.tar")
    spec = Spec(
        latents=LatentsSpec(model=str(ldm_folder), size=64),
        features=FeaturesSpec(blocks=(6,), timesteps=(300,)),
    )
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    store = folder / "undisturbed"
    command = Inputs(folder, {}).command(store, "--actors", "0", tars=["*.tar"])
    status, output = writers.run(*command)
    assert status == 0, (status, output)
    expected = read_arrays(store)
    assert len({_stem_of(name) for name in expected}) == NUM_TARS + 1
    return Inputs(folder, expected)


def _stem_of(array):
    """The tar's stem, of an array's name: ``latents/STEM-HASH/text``."""
    return array.split("/")[1].rpartition("-")[0]


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


class Run:
    """An ``ldznet encode`` in a process of its own."""

    def __init__(self, inputs, store, *options, address, tars=SCENES):
        self.store = store
        self._log = store.with_name(f"run-{time.monotonic_ns()}.log")
        command = [sys.executable, "-m", "jobs", *inputs.command(store, *options, tars=tars)]
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": address,
        }  # fmt: skip
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    @property
    def output(self):
        return self._log.read_text()

    def wait_until(self, condition):
        """Wait while it runs."""

        def met():
            assert self.process.poll() is None, self.output
            return condition()

        wait_until(met)

    def wait_for_commits(self, num):
        self.wait_until(lambda: len(list_commits(self.store)) >= num)

    def end(self):
        """Wait for its end; return its status."""
        return self.process.wait(TIMEOUT_S)


@pytest.fixture
def start(inputs):
    """A function: a run's arguments -> the run; none is left after the test."""
    runs = []

    def start(store, *options, **more):
        runs.append(Run(inputs, store, *options, **more))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()


def list_commits(store):
    """The records of the layer that ends a task, by file name."""
    return {path.name for path in store.glob("features-*/commits/*.json")}


def list_workers(nodes):
    """The actors' processes on these nodes, of those that have begun."""
    found = []
    for process in _children_of(nodes):
        with suppress(psutil.NoSuchProcess, IndexError):
            if process.cmdline()[0].startswith(ACTOR):
                found.append(process)
    return found


def _children_of(nodes):
    """What each node's raylet started, and what that did."""
    found = []
    for node in nodes:
        with suppress(psutil.NoSuchProcess):
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            found += raylet.children(recursive=True)
    return found


def halt_in_mid_task(run, nodes):
    """SIGSTOP a worker that has files of its task open; return it."""
    halted = []

    def halt_one():
        for worker in list_workers(nodes):
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(signal.SIGSTOP)
                if any("/data/" in file.path for file in worker.open_files()):
                    halted.append(worker)
                    return True
                worker.send_signal(signal.SIGCONT)
        return False

    run.wait_until(halt_one)
    return halted[0]


@pytest.fixture
def assert_whole(inputs, writers, read_arrays):
    """A function: run the command again; the store is then as if nothing had happened.

    What was committed stays as it was, every value is that of an undisturbed run, ``verify`` finds
    nothing, and after ``gc`` there is no file that no record names.
    """

    def check(store, tars=SCENES):
        kept = {path: path.read_bytes() for path in store.glob("*/commits/*.json")}
        num_done = len(list_commits(store))
        status, output = writers.run(*inputs.command(store, "--actors", "0", tars=tars))
        assert status == 0, (status, output)
        stems = inputs.list_tars(tars)
        assert f"{len(stems)} tasks: {num_done} committed" in output
        assert {path: path.read_bytes() for path in kept} == kept
        ours = read_arrays(store)
        assert ours.keys() == {name for name in inputs.expected if _stem_of(name) in stems}
        for name, values in ours.items():
            np.testing.assert_array_equal(values, inputs.expected[name], err_msg=name)
        opened = Store.open(str(store))
        assert [damage for seen in verify_store(opened) for damage in seen.damage] == []
        list(remove_orphans(opened, list_orphans(opened)))
        assert_no_stray_file(opened)

    return check


@pytest.fixture
def cluster():
    """A head that holds no worker; add nodes to it."""
    yield from _make_cluster(num_nodes=0)


@pytest.fixture(scope="module")
def lasting_cluster():
    """A head and two nodes, with room for a worker each; a tar of it is poison."""
    yield from _make_cluster(num_nodes=2)


def _make_cluster(*, num_nodes):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        for _ in range(num_nodes):
            add_node(cluster, env_vars=POISONED)
        yield cluster
    finally:
        children = _children_of(cluster.list_all_nodes())
        cluster.shutdown()
        for process in children:  # one that is halted would stay
            with suppress(psutil.NoSuchProcess):
                process.kill()


def add_node(cluster, **options):
    """Add a node with room for one worker, and for Ray's own small tasks."""
    return cluster.add_node(num_cpus=3, **options)
