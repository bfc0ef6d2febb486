"""Faults 1, 2, 8, 12, 18 and 20: a writer that dies, hangs, fails or races at each of its steps.

After a rerun the store holds the corpus once, bit for bit as if nothing had happened, and after
``gc`` no other file.
"""

import os
import re
import signal
import time

import numpy as np
import pytest
import yaml

from pipeline.base.failpoints import FAILPOINTS, count_steps, set_failpoints
from pipeline.encode.prepare import prepare_encode
from pipeline.scenes.scene import write_corpus
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.commit import list_records
from pipeline.store.store import Store
from pipeline.upkeep.gc import list_orphans, remove_orphans
from pipeline.upkeep.verify import verify_store
from tests.support.stray_files import assert_no_stray_file

NUM_TARS = 2
STEPS = [step for step in FAILPOINTS if not step.startswith("gc.")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, ldm_folder):
    """Two small tars and a spec of one block at one timestep."""
    folder = tmp_path_factory.mktemp("writers-corpus")
    write_corpus(folder, split="train", num_images=2 * NUM_TARS, images_per_tar=2, size_px=64)
    spec = Spec(
        latents=LatentsSpec(model=str(ldm_folder), size=64),
        features=FeaturesSpec(blocks=(6,), timesteps=(300,)),
    )
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    return folder, spec


@pytest.fixture(scope="module")
def undisturbed(inputs, read_arrays):
    """What a run without a fault stores, and (step -> passes before it encodes, after a task)."""
    run = prepare(inputs, inputs[0] / "undisturbed", failpoints="gc.removed=raise")
    before = count_steps()
    stage = EncodeStage(run.config)
    assert stage.encode(run.items[0]).status == "committed"
    after = count_steps()
    assert stage.encode(run.items[1]).status == "committed"
    set_failpoints("")
    return read_arrays(inputs[0] / "undisturbed"), before, after


@pytest.fixture(autouse=True)
def _failpoints_off():
    yield
    set_failpoints("")


def prepare(inputs, store, failpoints=""):
    """Set failpoints in this process and prepare a run."""
    set_failpoints(failpoints)
    folder, spec = inputs
    return prepare_encode(spec, [str(folder / "*.tar")], str(store), batch=8)


def command(inputs, store):
    folder = inputs[0]
    return (
        "encode", "--corpus", folder / "*.tar", "--store", store, "--spec", folder / "spec.yaml",
        "--actors", 0, "--threads", 1, "--batch", 8, "--metrics", store.with_suffix(".jsonl"),
    )  # fmt: skip


def list_committed(store):
    """(layer kind, task) of every record, newest generations."""
    opened = Store.open(str(store))
    return {
        (layer.kind, task)
        for layer in opened.list_layers()
        for task in list_records(opened.storage, layer.folder)
    }


def assert_as_undisturbed(store, expected, read_arrays):
    """Bit for bit the same values, sound, and after gc no file that no record names."""
    ours = read_arrays(store)
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
    opened = Store.open(str(store))
    assert [damage for check in verify_store(opened) for damage in check.damage] == []
    list(remove_orphans(opened, list_orphans(opened)))
    assert_no_stray_file(opened)
    assert not list(store.glob("*/commits/.*"))


def test_the_steps_are_all_passed(undisturbed):
    _, before, after = undisturbed
    assert [step for step in STEPS if after[step] <= before.get(step, 0)] == []


def kill_and_rerun(inputs, store, writers, step, at):
    status, output = writers.run(*command(inputs, store), failpoints=f"{step}@{at}=kill")
    assert status == -signal.SIGKILL, output
    committed = list_committed(store)
    kept = {path: path.stat().st_mtime_ns for path in store.glob("*/commits/*.json")}
    status, output = writers.run(*command(inputs, store))
    assert status == 0, output
    whole = sum(("features", task) in committed for kind, task in committed if kind == "latents")
    assert f"{NUM_TARS} tasks: {whole} committed, {NUM_TARS - whole} to encode" in output
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    return committed


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_a_step_of_its_first_commit(
    inputs, undisturbed, writers, read_arrays, tmp_path, step
):
    expected, before, _ = undisturbed
    store = tmp_path / "store"
    committed = kill_and_rerun(inputs, store, writers, step, before.get(step, 0) + 1)
    is_past_the_record = STEPS.index(step) >= STEPS.index("record.created")
    # Another task in hand may have come as far before the kill.
    assert {kind for kind, _ in committed} == ({"latents"} if is_past_the_record else set())
    tasks = {task for _, task in list_committed(store)}
    attempts = {task: len(list(store.glob(f"latents-*/data/{task}/*"))) for task in tasks}
    # Killed after its commit it is not encoded again: one attempt of it is all there is.
    assert all(attempts[task] == 1 for _, task in committed)
    no_folder = step == "attempt.opened"  # before the first byte
    assert max(attempts.values()) == 2 or is_past_the_record or no_folder
    assert_as_undisturbed(store, expected, read_arrays)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_a_step_of_its_tasks_last_commit(
    inputs, undisturbed, writers, read_arrays, tmp_path, step
):
    expected, _, after = undisturbed
    committed = kill_and_rerun(inputs, tmp_path / "store", writers, step, after[step])
    is_past_the_record = STEPS.index(step) >= STEPS.index("record.created")
    assert len(committed) == 1 + is_past_the_record
    assert_as_undisturbed(tmp_path / "store", expected, read_arrays)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_again_and_again(inputs, undisturbed, writers, read_arrays, tmp_path, seed):
    """Fault 3: a step drawn at random for each start, until one comes to its end."""
    expected, _, after = undisturbed
    draw = np.random.default_rng(seed)
    store = tmp_path / "store"
    for _ in range(6):
        step = STEPS[draw.integers(len(STEPS))]
        at = int(draw.integers(1, after[step] + 1))
        status, output = writers.run(*command(inputs, store), failpoints=f"{step}@{at}=kill")
        assert status in (0, -signal.SIGKILL), output
    assert writers.run(*command(inputs, store))[0] == 0
    assert_as_undisturbed(store, expected, read_arrays)


@pytest.mark.parametrize("action", ["raise", "full"])
def test_an_error_at_any_step_fails_its_task_and_a_rerun_mends_it(
    inputs, undisturbed, read_arrays, tmp_path, action
):
    """Fault 12 too. Before the record nothing is left; after it the commit is ours."""
    expected = undisturbed[0]
    store = tmp_path / "store"
    run = prepare(inputs, store)
    stage = EncodeStage(run.config)
    text = {"raise": "failpoint", "full": "No space left on device"}[action]
    for step in STEPS:
        set_failpoints(f"{step}={action}")
        outcome = stage.encode(run.items[0])
        if step == "record.created":  # the error is an answer lost; the record is there and ours
            assert outcome.status == "committed", outcome
            break
        assert outcome.status == "failed"
        assert text in outcome.error
        left = list(store.glob("latents-*/data/*/*"))
        assert len(left) == (step == "record.written"), step  # only gc may tell there
        assert list_committed(store) == set()
    set_failpoints(f"commit.acknowledged={action}")
    assert stage.encode(run.items[1]).status == "committed"  # its record was there
    assert prepare(inputs, store).items == ()
    assert_as_undisturbed(store, expected, read_arrays)


def wait_for(*paths):
    deadline = time.monotonic() + 100
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"none of {paths}"
        time.sleep(0.01)


def test_a_writer_that_hangs_past_anothers_commit_ends_well(
    inputs, undisturbed, writers, read_arrays, tmp_path
):
    """Faults 8 and 20: halted with everything written, gc beside it, then overtaken, then on."""
    store = tmp_path / "store"
    pid, log = writers.start(*command(inputs, store), failpoints="files.verified=stop")
    assert writers.wait(pid) == -signal.SIGSTOP
    opened = Store.open(str(store))
    assert list(list_orphans(opened)) == []  # it may still win
    status, output = writers.run(*command(inputs, store))
    assert status == 0, output
    committed = {path: path.read_bytes() for path in store.glob("*/commits/*.json")}
    orphans = {orphan.path for orphan in list_orphans(opened)}
    assert orphans  # one for each task that it had in hand
    os.kill(pid, signal.SIGCONT)
    assert writers.wait(pid) == 0, log.read_text()
    assert re.search(r"2 tasks, [0-9]+ pairs: another run committed first", log.read_text())
    assert {path: path.read_bytes() for path in store.glob("*/commits/*.json")} == committed
    assert orphans <= {orphan.path for orphan in list_orphans(opened)}
    assert_as_undisturbed(store, undisturbed[0], read_arrays)


def test_a_loser_whose_files_gc_has_removed_ends_well(
    inputs, undisturbed, writers, read_arrays, tmp_path
):
    """Faults 18 and 20: halted while it writes, overtaken, its attempt dropped, then on."""
    store = tmp_path / "store"
    pid, log = writers.start(*command(inputs, store), failpoints="shard.closed=stop")
    assert writers.wait(pid) == -signal.SIGSTOP
    status, output = writers.run(*command(inputs, store))
    assert status == 0, output
    status, output = writers.run("gc", store)
    assert status == 0
    assert re.search("[12] orphans? removed", output), output  # of each task that it had in hand
    os.kill(pid, signal.SIGCONT)
    assert writers.wait(pid) == 0, log.read_text()
    assert_as_undisturbed(store, undisturbed[0], read_arrays)


def test_gc_beside_a_slow_commit_removes_nothing_of_it(
    inputs, undisturbed, writers, read_arrays, tmp_path
):
    """Fault 20: halted right before the record's name is taken; then it commits."""
    store = tmp_path / "store"
    at = undisturbed[1]["record.written"] + 1
    pid, log = writers.start(*command(inputs, store), failpoints=f"record.written@{at}=stop")
    assert writers.wait(pid) == -signal.SIGSTOP
    files = sorted(path for path in store.rglob("*"))
    status, output = writers.run("gc", store)
    assert (status, "0 orphans removed" in output) == (0, True)
    assert sorted(path for path in store.rglob("*")) == files
    os.kill(pid, signal.SIGCONT)
    assert writers.wait(pid) == 0, log.read_text()
    assert "in 2 tasks" in log.read_text()
    assert_as_undisturbed(store, undisturbed[0], read_arrays)


def test_two_runs_from_a_barrier_both_end_well(inputs, undisturbed, writers, read_arrays, tmp_path):
    """Fault 18: both written to the end before either commits its first task."""
    store = tmp_path / "store"
    first = undisturbed[1]["record.written"] + 1
    pids = {}
    for at in (first, first - 2):  # the second finds both layers' specs there
        pid, log = writers.start(*command(inputs, store), failpoints=f"record.written@{at}=stop")
        pids[pid] = log
        assert writers.wait(pid) == -signal.SIGSTOP
    assert list_committed(store) == set()
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert [writers.wait(pid) for pid in pids] == [0, 0]
    assert any("another run committed first" in log.read_text() for log in pids.values())
    assert len(list(store.glob("*/commits/*.json"))) == 2 * NUM_TARS
    assert_as_undisturbed(store, undisturbed[0], read_arrays)
