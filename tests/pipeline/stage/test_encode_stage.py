"""The encode stage with several items in hand: the same values, nothing computed twice."""

import dataclasses
import io
import shutil
import socket
import tarfile
import tempfile
import threading
import time
from contextlib import closing

import fsspec
import numpy as np
import pytest
import torch

from pipeline.base.outages import PATIENCE
from pipeline.encode.prepare import prepare_encode
from pipeline.scenes.scene import write_corpus
from pipeline.stage import node_guard
from pipeline.stage.encode_stage import MAX_IN_FLIGHT, EncodeStage
from pipeline.stage.lanes import StageClosedError
from pipeline.stage.work import STAGES
from pipeline.store.store import Store


def prepare(spec, corpus, store, *, batch=8):
    return prepare_encode(spec, [str(corpus / "*.tar")], str(store), batch=batch)


@pytest.fixture
def opened(tmp_path, corpus_folder, spec):
    """A run over the three tars, and its stage."""
    run = prepare(spec, corpus_folder, tmp_path / "store")
    stage = EncodeStage(run.config)
    yield run, stage
    stage.close()


def assert_equal(read_arrays, store, other):
    ours, theirs = read_arrays(store), read_arrays(other)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)


@pytest.mark.thorough
def test_items_in_hand_at_once_give_the_values_of_one_after_another(
    opened, tmp_path, store_folder, read_arrays
):
    run, stage = opened
    futures = [stage.submit(item) for item in run.items]
    outcomes = [future.result(120) for future in futures]
    assert [outcome.status for outcome in outcomes] == ["committed"] * 3
    assert [outcome.task for outcome in outcomes] == [item.task.id for item in run.items]
    assert_equal(read_arrays, tmp_path / "store", store_folder)
    for outcome in outcomes:
        assert set(outcome.busy_s) == set(STAGES)
        assert min(outcome.busy_s.values()) > 0
        assert outcome.num_bytes > 0


def test_one_item_is_read_while_another_computes(opened):
    """The device halts in the first item's VAE; the second's views are decoded meanwhile."""
    run, stage = opened
    latents = stage.load_latents()
    computing, read = threading.Event(), threading.Event()
    calls = []
    decode_views = latents.decoder.decode_views

    def note(*arguments, **options):
        calls.append(None)
        yield from decode_views(*arguments, **options)
        if len(calls) == 2:
            read.set()

    def halt(module, arguments):
        computing.set()
        assert read.wait(60), "the second item was not read while the first computed"

    latents.decoder.decode_views = note
    latents.encoder.vae.encoder.register_forward_pre_hook(halt)
    futures = [stage.submit(item) for item in run.items[:2]]
    assert computing.wait(60)
    assert [future.result(60).status for future in futures] == ["committed"] * 2


def test_a_prompt_is_encoded_once_for_all_tasks(opened, tmp_path):
    run, stage = opened
    seen, sizes = [], []

    def note(module, arguments):
        sizes.append(len(arguments[0]))
        seen.extend(prompt for prompt in arguments[0] if prompt)  # the empty one fills passes up

    stage.load_latents().encoder.text_encoder.register_forward_pre_hook(note)
    for item in run.items:
        assert stage.encode(item).status == "committed"
    store = Store.open(str(tmp_path / "store"))
    commits = store.newest_commits(run.config.latents.folder).values()
    prompts = {prompt for c in commits for prompt in store.read_index(c)["prompt"].to_pylist()}
    assert sorted(seen) == sorted(prompts)
    assert set(sizes) == {8}  # whatever the number of prompts: rows do not depend on their company
    assert sum(commit.rows["prompts"] for commit in commits) > len(seen)  # tasks share some


def test_memory_that_is_short_halves_the_batch_and_changes_no_value_beyond_the_tolerance(
    opened, tmp_path, store_folder, read_arrays
):
    """Fault 10: VAE, text encoder and UNet each refuse more than three rows."""
    run, stage = opened
    sizes = {"vae": [], "text": [], "unet": []}
    latents, features = stage.load_latents(), stage.load_features()

    def refuse(name):
        def hook(module, arguments, options):
            given = arguments[0] if arguments else options["sample"]
            sizes[name].append(len(given))
            if len(given) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        return hook

    modules = {
        "vae": latents.encoder.vae.encoder,
        "text": latents.encoder.text_encoder,
        "unet": features.encoder.unet.conv_in,
    }
    for name, module in modules.items():
        module.register_forward_pre_hook(refuse(name), with_kwargs=True)
    outcomes = [stage.encode(item) for item in run.items]
    assert [outcome.status for outcome in outcomes] == ["committed"] * 3, outcomes
    for name, seen in sizes.items():
        too_large = [size for size in seen if size > 3]
        assert too_large, name
        first_that_fits = next(i for i, size in enumerate(seen) if size <= 3)
        assert max(seen[first_that_fits:]) <= 3, f"{name}: not learned for good: {seen}"
    tolerance = {x.kind: x.tolerance for x in Store.open(str(store_folder)).list_layers()}
    ours, theirs = read_arrays(tmp_path / "store"), read_arrays(store_folder)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        limit = tolerance[name.split("/")[0]] * np.abs(theirs[name].astype(np.float64)).max()
        difference = np.abs(values.astype(np.float64) - theirs[name].astype(np.float64))
        assert difference.max() <= (limit if values.dtype.kind == "f" else 0), name


def test_what_another_run_commits_meanwhile_is_not_computed_again(
    opened, tmp_path, corpus_folder, spec
):
    run, stage = opened
    other = prepare(spec, corpus_folder, tmp_path / "store")
    assert len(other.items) == 3
    for item in run.items:
        assert stage.encode(item).status == "committed"
    late = EncodeStage(other.config)
    outcomes = [late.encode(item) for item in other.items]
    assert [outcome.status for outcome in outcomes] == ["lost"] * 3
    assert [outcome.num_bytes for outcome in outcomes] == [0, 0, 0]
    assert late._latents_stage is None  # no model was even loaded
    assert len(list((tmp_path / "store").glob("*/data/*/*"))) == 6  # no second attempt


def test_a_run_that_comes_between_the_layers_goes_on_from_the_other_runs_latents(
    opened, tmp_path, store_folder, read_arrays, corpus_folder, spec
):
    run, stage = opened
    latents_only = spec.model_copy(update={"features": None})
    first = prepare(latents_only, corpus_folder, tmp_path / "store")
    assert EncodeStage(first.config).encode(first.items[0]).status == "committed"
    outcome = stage.encode(run.items[0])
    assert outcome.status == "committed"  # by us: the last layer counts, once among all runs
    assert set(outcome.busy_s) == {"fetch", "read", "unet", "write", "commit"}
    assert all(stage.encode(item).status == "committed" for item in run.items[1:])
    assert_equal(read_arrays, tmp_path / "store", store_folder)


def test_a_worker_that_died_between_the_layers_leaves_its_runs_work_counted(
    tmp_path, corpus_folder, spec
):
    """The next worker of the run finds its latents: they are the run's own, rejects included."""
    with tarfile.open(corpus_folder / "scenes-val-00000.tar") as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for member, data in members[:-1]:  # the last sample lacks its last mask
            tar.addfile(member, io.BytesIO(data))
    whole = prepare_encode(spec, [str(tmp_path / "x.tar")], str(tmp_path / "x"), batch=8)
    first = EncodeStage(dataclasses.replace(whole.config, features=None))
    assert first.encode(whole.items[0]).status == "committed"
    outcome = EncodeStage(whole.config).encode(whole.items[0])
    assert outcome.status == "committed"
    assert outcome.rejects == {"missing_mask": 1}
    again = EncodeStage(whole.config).encode(whole.items[0])
    assert (again.status, again.rejects) == ("committed", {"missing_mask": 1})
    assert again.num_bytes == outcome.num_bytes


@pytest.fixture
def halted(opened):
    """The run's items in hand, the device halted in a VAE pass until the event is set."""
    run, stage = opened
    computing, go_on = threading.Event(), threading.Event()

    def halt(module, arguments):
        computing.set()
        assert go_on.wait(60)

    stage.load_latents().encoder.vae.encoder.register_forward_pre_hook(halt)
    futures = [stage.submit(item) for item in run.items]
    assert computing.wait(60)
    yield futures, go_on
    go_on.set()


def assert_all_closed(futures):
    for future in futures:
        with pytest.raises(StageClosedError, match="was closed"):
            future.result(10)


def test_closing_while_the_device_is_stuck_answers_all_the_same(opened, halted, monkeypatch):
    monkeypatch.setattr("pipeline.stage.lanes.CLOSE_TIMEOUT_S", 0.3)
    opened[1].close()
    assert_all_closed(halted[0])


def test_closing_gives_up_what_is_in_hand_and_leaves_nothing_half(opened, halted, tmp_path):
    run, stage = opened
    futures, go_on = halted
    threading.Timer(0.2, go_on.set).start()
    stage.close()
    assert_all_closed(futures)
    with pytest.raises(StageClosedError):
        stage.encode(run.items[0])
    assert not list((tmp_path / "store").glob("*/commits/*.json"))
    assert not list((tmp_path / "store").rglob("data/*/*/*"))


@pytest.mark.thorough
def test_a_wait_for_an_outage_is_progress_and_ends_when_the_stage_is_closed(
    spec, corpus_folder, s3_url, proxy, monkeypatch
):
    run, before = prepare(spec, corpus_folder, s3_url), set(threading.enumerate())
    stage, waited = EncodeStage(run.config), threading.Event()
    monkeypatch.setattr(
        stage, "_report_progress", lambda step: waited.set() if step == "outage" else None
    )
    proxy.add("throttled", "PUT")
    futures = [stage.submit(item) for item in run.items]
    assert waited.wait(60)
    assert not any(future.done() for future in futures)
    stage.close()
    assert_all_closed(futures)
    assert PATIENCE.askers == []
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith(("latents-", "features-")):
            thread.join(30)
            assert not thread.is_alive(), thread.name


def test_a_fault_of_the_code_is_raised_and_not_taken_for_the_tasks(opened):
    run, stage = opened

    def fail(module, arguments):
        raise AssertionError("a bug")

    handle = stage.load_latents().encoder.vae.encoder.register_forward_pre_hook(fail)
    with pytest.raises(AssertionError, match="a bug"):
        stage.encode(run.items[0])
    handle.remove()
    assert stage.encode(run.items[0]).status == "committed"


def hold_device(stage, released):
    """Let no view be encoded before an event is set."""

    def hold(module, arguments):
        assert released.wait(60)

    stage.load_latents().encoder.vae.encoder.register_forward_pre_hook(hold)


def test_more_items_than_fit_at_once_wait_their_turn(spec, tmp_path):
    """The device waits until all are handed in, so that none is done before the last comes."""
    num_tars = 2 * MAX_IN_FLIGHT + 1
    write_corpus(tmp_path, split="train", num_images=num_tars, images_per_tar=1, size_px=64)
    run = prepare(spec, tmp_path, tmp_path / "store")
    submitted = threading.Event()
    with closing(EncodeStage(run.config)) as stage:
        hold_device(stage, submitted)
        futures = [stage.submit(item) for item in run.items]
        assert not any(future.done() for future in futures)
        submitted.set()
        statuses = [future.result(120).status for future in futures]
    assert statuses == ["committed"] * num_tars


@pytest.mark.thorough
def test_one_task_in_hand_twice_is_committed_once(opened, tmp_path, store_folder, read_arrays):
    """Either may come first; both are begun before any commit."""
    run, stage = opened
    submitted = threading.Event()
    hold_device(stage, submitted)
    futures = [stage.submit(item) for item in run.items * 2]
    submitted.set()
    assert [future.result(120).status for future in futures] == ["committed"] * 6  # by this run
    assert_equal(read_arrays, tmp_path / "store", store_folder)


@pytest.fixture
def quick_pauses(monkeypatch):
    monkeypatch.setattr(node_guard, "FIRST_PAUSE_S", 0.01)


def copy_to_memory(corpus_folder):
    """The URLs of tars that must be copied to TMPDIR to be read."""
    memory = fsspec.filesystem("memory")
    for path in corpus_folder.glob("*.tar"):
        memory.pipe_file(f"/node-faults/{path.name}", path.read_bytes())
    return "memory://node-faults/*.tar"


def test_a_machine_without_a_place_for_copies_fails_no_tar_and_works_again_with_one(
    tmp_path, corpus_folder, spec, quick_pauses, monkeypatch
):
    urls = copy_to_memory(corpus_folder)
    run = prepare_encode(spec, [urls], str(tmp_path / "store"), batch=8)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with closing(EncodeStage(run.config)) as stage:
        for _ in range(2):  # by the copy, then by the test of the machine
            outcome = stage.encode(run.items[0])
            assert (outcome.status, outcome.cause) == ("failed", "node")
            assert (outcome.node, "No such file" in outcome.error) == (socket.gethostname(), True)
        (tmp_path / "none").mkdir()
        assert stage.encode(run.items[0]).status == "committed"


def test_a_machine_without_its_gpu_or_its_store_is_at_fault(
    opened, tmp_path, quick_pauses, monkeypatch
):
    """As a GPU that fell off the bus, and a network file system that is not mounted."""
    run, _ = opened
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elsewhere = str(tmp_path / "elsewhere")
    for change, says in (
        ({"needs_gpu": True}, "expected a GPU, torch sees none"),
        ({"store_url": elsewhere}, f"{elsewhere}: no latents-"),
    ):
        with closing(EncodeStage(dataclasses.replace(run.config, **change))) as stage:
            outcome = stage.encode(run.items[0])
        assert (outcome.status, outcome.cause) == ("failed", "node")
        assert says in outcome.error
    assert not (tmp_path / "elsewhere").exists()


def test_a_machine_that_has_not_the_model_is_at_fault(
    tmp_path, corpus_folder, spec, ldm_folder, quick_pauses
):
    """A folder that the driver has, and this machine lacks until it is mounted."""
    model = tmp_path / "ldm"
    shutil.copytree(ldm_folder, model)
    latents = spec.latents.model_copy(update={"model": str(model)})
    run = prepare(spec.model_copy(update={"latents": latents}), corpus_folder, tmp_path / "store")
    model.rename(tmp_path / "unmounted")
    with closing(EncodeStage(run.config)) as stage:
        outcome = stage.encode(run.items[0])
        assert (outcome.status, outcome.cause) == ("failed", "node")
        assert "NodeError: ModelFilesError: " in outcome.error
        (tmp_path / "unmounted").rename(model)
        assert stage.encode(run.items[0]).status == "committed"


def test_closing_ends_the_pause_of_a_machine_at_fault(opened):
    run, _ = opened
    stage = EncodeStage(dataclasses.replace(run.config, store_url="/no/such/store"))
    future = stage.submit(run.items[0])
    while not stage._guard._until_s:
        time.sleep(0.01)
    stage.close()
    with pytest.raises(StageClosedError):
        future.result(60)
