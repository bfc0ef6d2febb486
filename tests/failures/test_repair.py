"""Fault 13 to its end: damage, ``verify --report``, ``encode --repair``, the next generation."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from pipeline.encode.prepare import prepare_encode
from pipeline.evaluate.run import run_evaluate
from pipeline.read.reader import PairReader
from pipeline.read.source import Source
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.layout import GROUP
from pipeline.store.snapshot import create_snapshot, read_snapshot
from pipeline.store.store import Store
from pipeline.upkeep.verify import VerifyTotals, read_damage, verify_store
from tests.support.missing import list_missing
from tests.support.train_runs import PROBE, assert_same_run, fit_here, fit_newest

pytestmark = pytest.mark.thorough

SHARDS = {
    "latents": f"{GROUP}/latent_mean/c/0/0/0/0",
    "features": f"{GROUP}/block06/c/0/0/0/0/0",
}


def flip(path, at=10):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def layers(copied_store):
    return {layer.kind: layer for layer in Store.open(str(copied_store)).list_layers()}


@pytest.fixture
def tasks(copied_store, layers):
    """Task ids, sorted."""
    return list(Store.open(str(copied_store)).newest_commits(layers["latents"].folder))


@pytest.fixture
def damage_shard(copied_store, layers):
    """A function: flip a byte of a task's shard in the layer of a kind."""

    def damage(kind, task):
        commit = Store.open(str(copied_store)).newest_commits(layers[kind].folder)[task]
        flip(copied_store / commit.data_folder / SHARDS[kind])

    return damage


@pytest.fixture
def repair(copied_store, corpus_folder, spec, tmp_path):
    """A function: report the damage, encode anew what it names; return (items, damage left)."""

    def run(report=None):
        if report is None:
            report = tmp_path / "report.json"
            verify(copied_store).write(report)
        run = prepare_encode(
            spec, [str(corpus_folder / "*.tar")], str(copied_store), batch=8,
            damage=read_damage(report),
        )  # fmt: skip
        stage = EncodeStage(run.config)
        for item in run.items:
            outcome = stage.encode(item)
            assert outcome.status == "committed", outcome.error
        return run.items, verify(copied_store).damage

    return run


def verify(folder):
    totals = VerifyTotals()
    for check in verify_store(Store.open(str(folder))):
        totals.add(check)
    return totals


def generations(folder):
    """{(kind, task): newest generation}."""
    store = Store.open(str(folder))
    return {
        (layer.kind, task): commit.generation
        for layer in store.list_layers()
        for task, commit in store.newest_commits(layer.folder).items()
    }


def assert_equal_stores(folder, other, read_arrays):
    ours, theirs = read_arrays(folder), read_arrays(other)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


@pytest.mark.parametrize("kinds", [("latents",), ("features",), ("latents", "features")])
def test_what_is_damaged_is_encoded_anew_and_nothing_else(
    copied_store, store_folder, damage_shard, repair, tasks, read_arrays, kinds
):
    before = {path: path.read_bytes() for path in copied_store.rglob("*") if path.is_file()}
    for kind in kinds:
        damage_shard(kind, tasks[0])
    items, left = repair()
    assert left == []
    assert [item.task.id for item in items] == [tasks[0]]
    expected = {
        (kind, task): int(kind in kinds and task == tasks[0])
        for kind in SHARDS
        for task in tasks
    }  # fmt: skip
    assert generations(copied_store) == expected
    assert_equal_stores(copied_store, store_folder, read_arrays)
    changed = [path for path, data in before.items() if path.read_bytes() != data]
    assert len(changed) == len(kinds)  # what the test itself damaged: a repair alters no file


def test_a_report_given_twice_repairs_once(
    copied_store, damage_shard, repair, tasks, tmp_path, corpus_folder, spec
):
    damage_shard("latents", tasks[1])
    repair()
    files = sorted(path for path in copied_store.rglob("data/*/*/*"))
    items, left = repair(tmp_path / "report.json")
    assert (items, left) == ((), [])
    assert sorted(path for path in copied_store.rglob("data/*/*/*")) == files


def test_a_repair_that_is_damaged_is_repaired(copied_store, damage_shard, repair, tasks):
    for generation in (1, 2):
        damage_shard("features", tasks[0])
        assert repair()[1] == []
        assert generations(copied_store)["features", tasks[0]] == generation


def test_two_repairs_at_once_have_one_winner(
    copied_store, damage_shard, tasks, corpus_folder, spec, layers
):
    damage_shard("latents", tasks[0])
    damage = verify(copied_store).damage
    run = prepare_encode(
        spec, [str(corpus_folder / "*.tar")], str(copied_store), batch=8, damage=damage
    )
    stages = [EncodeStage(replace(run.config, run=name)) for name in ("one", "another")]
    assert [s.encode(run.items[0]).status for s in stages] == ["committed", "lost"]
    assert generations(copied_store)["latents", tasks[0]] == 1
    assert verify(copied_store).damage == []


def test_lost_latents_are_encoded_anew_under_their_features(
    copied_store, store_folder, repair, tasks, read_arrays, layers
):
    (copied_store / layers["latents"].folder / "commits" / f"{tasks[0]}.0000.json").unlink()
    (item,), left = repair()
    assert (item.latents, item.next_latents, item.features, item.next_features) == (
        None,
        0,
        None,
        1,
    )
    assert left == []
    assert_equal_stores(copied_store, store_folder, read_arrays)


def test_readers_see_the_repair_and_a_snapshot_keeps_what_it_pins(
    copied_store, damage_shard, repair, tasks, layers
):
    store = Store.open(str(copied_store))
    folders = [layer.folder for layer in layers.values()]
    pinned = create_snapshot(store, folders)
    sound = read_all(store, layers, pinned)
    damage_shard("features", tasks[0])
    repair()
    newer = create_snapshot(store, folders)
    assert newer.digest != pinned.digest
    assert torch.equal(read_all(store, layers, newer), sound)
    again = read_snapshot(store, pinned.digest)
    assert {record.generation for record in again.records[layers["features"].folder]} == {0}
    with pytest.raises(RuntimeError, match=r"block06.*CRC-32C differs"):
        read_all(store, layers, again)


def read_all(store, layers, snapshot):
    source = Source(store, layers["latents"], layers["features"], snapshot)
    reader = PairReader(source, tasks="*", inputs=frozenset({"features"}), blocks=(6,))
    batch = reader.read(range(len(reader)), draws=[0] * len(reader))
    return batch.inputs["features"][6]


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("features", SHARDS["features"]),
        ("features", f"{GROUP}/block06/zarr.json"),
        ("features", "record"),
        ("latents", f"{GROUP}/mask/c/0/0/0"),
        ("latents", "record"),
    ],
)
def test_a_run_that_met_damage_and_went_on_after_its_repair_is_the_undisturbed_run(
    copied_store, store_folder, repair, tasks, layers, tmp_path, caplog, kind, file
):
    """Also where the repair itself was damaged and repaired, and where a record is what is lost."""
    out, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    fit_newest(PROBE, store_folder, undisturbed)
    create_snapshot(Store.open(str(copied_store)), [layer.folder for layer in layers.values()])
    asked = iter([False] * 4)
    fit_here(PROBE, copied_store, out, should_stop=lambda: next(asked, True))
    for generation in (1, 2):
        commit = Store.open(str(copied_store)).newest_commits(layers[kind].folder)[tasks[0]]
        name = commit.name if file == "record" else f"{commit.data_folder}/{file}"
        flip(copied_store / name)
        with pytest.raises(RuntimeError, match=r"ldznet verify .* --report .* --repair FILE"):
            fit_newest(PROBE, copied_store, out)
        assert repair()[1] == []
        assert generations(copied_store)[kind, tasks[0]] == generation
    fit_newest(PROBE, copied_store, out)
    assert f"the same content is read, as a repair writes it: {tasks[0]}" in caplog.text
    assert_same_run(out, undisturbed)
    (ours,) = (row for row in run_evaluate(str(copied_store), out) if not row.baseline)
    (theirs,) = (row for row in run_evaluate(str(store_folder), undisturbed) if not row.baseline)
    assert (ours.scores.mIoU, ours.snapshot) == (theirs.scores.mIoU, theirs.snapshot)


def test_a_record_that_cannot_be_read_fails_its_task_until_it_is_repaired(
    copied_store, store_folder, corpus_folder, spec, tmp_path, tasks, layers, writers, read_arrays
):
    """By the commands: encode says so with status 3 and does the others; repair mends it."""
    folder = copied_store / layers["latents"].folder / "commits"
    record = folder / f"{tasks[0]}.0000.json"
    record.write_bytes(record.read_bytes()[:50])
    (copied_store / layers["features"].folder / "commits" / f"{tasks[1]}.0000.json").unlink()
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    encode = (
        "encode", "--corpus", corpus_folder / "*.tar", "--store", copied_store, "--batch", 8,
        "--spec", tmp_path / "spec.yaml", "--actors", 0, "--threads", 1,
        "--metrics", tmp_path / "m.jsonl",
    )  # fmt: skip
    status, output = writers.run(*encode)
    assert status == 3, output
    assert "3 tasks: 1 committed, 1 to encode, 1 that cannot be encoded" in output
    assert f"failed {tasks[0]}: {record.relative_to(copied_store)}: the commit record" in output
    assert "in 1 task" in output
    report = tmp_path / "r.json"
    verify_command = ("verify", copied_store, "--metrics", tmp_path / "v.jsonl")
    status, output = writers.run(*verify_command, "--report", report)
    assert status == 1, output
    assert len(json.loads(report.read_text())["damage"]) == 1
    status, output = writers.run(*encode, "--repair", report)
    assert status == 0, output
    assert writers.run(*verify_command)[0] == 0
    assert (folder / f"{tasks[0]}.0001.json").exists()
    assert len(record.read_bytes()) == 50
    assert_equal_stores(copied_store, store_folder, read_arrays)
    # The damaged record stays and stops nothing; what goes are the features unlinked above.
    status, output = writers.run("gc", copied_store)
    assert (status, "1 orphan removed" in output) == (0, True), output
    assert list(copied_store.glob(f"latents-*/data/{tasks[0]}/0000-*"))
    status, output = writers.run(*encode)
    assert (status, "3 tasks: 3 committed, 0 to encode" in output) == (0, True), output


def test_a_repair_that_is_cut_between_its_layers_goes_on(
    copied_store, store_folder, damage_shard, repair, tasks, tmp_path, read_arrays, layers
):
    """The same report again, where the latents' repair was committed and the features' not."""
    for kind in SHARDS:
        damage_shard(kind, tasks[0])
    repair()
    commits = copied_store / layers["features"].folder / "commits"
    (commits / f"{tasks[0]}.0001.json").unlink()
    (item,), left = repair(tmp_path / "report.json")
    assert (item.latents, item.features, item.next_features) == (1, None, 1)
    assert left == []
    assert_equal_stores(copied_store, store_folder, read_arrays)
    store = Store.open(str(copied_store))
    assert list_missing(store, layers["latents"], layers["features"], [item.task]) == []


def test_a_tar_rewritten_since_does_not_replace_damaged_latents(tmp_path, corpus_folder, spec):
    """Fault 22, between a commit and its repair: same name, same size, another image."""
    tar = tmp_path / "scenes.tar"
    shutil.copy(next(corpus_folder.glob("*val*.tar")), tar)
    folder = tmp_path / "store"

    run = prepare_encode(spec, [str(tar)], str(folder), batch=8)
    assert EncodeStage(run.config).encode(run.items[0]).status == "committed"
    flip(next(folder.glob(f"latents-*/data/*/*/{SHARDS['latents']}")))
    there = tar.stat()
    flip(tar, at=tar.read_bytes().index(b"IDAT") + 40)
    damage = verify(folder).damage
    run = prepare_encode(spec, [str(tar)], str(folder), batch=8, damage=damage)
    assert [suspect.url for suspect in run.suspects] == [tar.as_uri()]
    os.utime(tar, ns=(there.st_atime_ns, there.st_mtime_ns))  # nothing tells that it changed
    run = prepare_encode(spec, [str(tar)], str(folder), batch=8, damage=damage)
    outcome = EncodeStage(run.config).encode(run.items[0])
    assert outcome.status == "failed"
    assert "expected the tar that was encoded or listed" in outcome.error
    assert set(generations(folder).values()) == {0}
