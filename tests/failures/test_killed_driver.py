"""Faults 4 and 7: the driver killed, or interrupted, in mid-encode; then the same command again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.scenes.scene import write_corpus

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
NUM_TARS = 24  # three times what two actors have in hand


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, spec):
    """Eight small tars and a spec file."""
    folder = tmp_path_factory.mktemp("killed")
    write_corpus(folder, split="train", num_images=3 * NUM_TARS, images_per_tar=3, size_px=64)
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    return folder


def list_arguments(inputs, store, *, actors):
    return [
        "encode", "--corpus", str(inputs / "*.tar"), "--store", str(store), "--spec",
        str(inputs / "spec.yaml"), "--actors", str(actors), "--batch", "4",
        "--metrics", str(store.with_suffix(".jsonl")),
    ]  # fmt: skip


def start_encode(inputs, store):
    command = [sys.executable, "-m", "jobs", *list_arguments(inputs, store, actors=2)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def list_commits(store):
    return sorted(path.name for path in store.glob("features-*/commits/*.json"))


def wait_for_commits(process, store, num, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while len(list_commits(store)) < num:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no commit in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(inputs, read_arrays, writers):
    """What a run that nobody disturbs leaves, without Ray, and its tasks."""
    run_here(inputs, inputs / "undisturbed", writers)
    return read_arrays(inputs / "undisturbed")


def run_here(inputs, store, writers):
    """Run the command without Ray and return what it says."""
    status, output = writers.run(*list_arguments(inputs, store, actors=0), "--threads", "1")
    assert status == 0, output
    return output


def run_again(inputs, store):
    """Run the same command again and return what it says."""
    process = start_encode(inputs, store)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return output


def assert_completes(store, undisturbed, read_arrays, rerun):
    """``rerun`` ends well, redoes nothing committed, and the stores are equal."""
    done = list_commits(store)
    kept = {path: path.stat().st_mtime_ns for path in store.glob("*/commits/*.json")}
    output = rerun()
    assert f"{NUM_TARS} tasks: {len(done)} committed, {NUM_TARS - len(done)} to encode" in output
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    ours = read_arrays(store)
    assert ours.keys() == undisturbed.keys()
    for name, values in undisturbed.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


def test_kill_9_of_the_driver(inputs, undisturbed, read_arrays):
    store = inputs / "killed"
    process = start_encode(inputs, store)
    wait_for_commits(process, store, 2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert_no_workers(process.pid)
    assert 2 <= len(list_commits(store)) < NUM_TARS
    assert_completes(store, undisturbed, read_arrays, lambda: run_again(inputs, store))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_within_ten_seconds_and_says_how_to_go_on(
    inputs, undisturbed, read_arrays, writers, number
):
    store = inputs / f"interrupted-{number}"
    process = start_encode(inputs, store)
    wait_for_commits(process, store, 2)
    start = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal's Ctrl-C: the whole foreground group
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    elapsed_s = time.monotonic() - start
    assert process.returncode == 130, errors
    assert "What is committed stays; to go on:\n  ldznet encode " in errors
    assert "encode interrupted" in errors
    assert "Traceback" not in errors
    assert elapsed_s < 10  # the promise that the README makes, not a speed
    assert_no_workers(process.pid)
    assert_completes(store, undisturbed, read_arrays, lambda: run_here(inputs, store, writers))


def assert_no_workers(session, timeout_s=60):
    """Ray's processes of the driver's session end by themselves.

    All but two agents that hold no work: after a kill -9 they wait a minute for the dead GCS.
    """
    deadline = time.monotonic() + timeout_s
    while left := _processes_of(session):
        assert time.monotonic() < deadline, f"left running: {left}"
        time.sleep(0.2)


def _processes_of(session):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        name, _, rest = text.partition("(")[2].rpartition(")")
        fields = rest.split()
        agent = name in ("ray::DashboardA", "ray::RuntimeEnv")  # 15 characters, as Linux keeps
        if int(fields[3]) == session and fields[0] != "Z" and not agent:
            found.append((path.parent.name, name))
    return found
