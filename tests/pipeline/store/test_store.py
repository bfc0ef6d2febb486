"""A store as the encode stage wrote it: read back with and without our code, damage found."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from models.ldm.files import ModelFilesError
from pipeline.base.job_copy import JOB_COPIES, JOB_VARIABLE
from pipeline.base.yaml import SpecError
from pipeline.spec.build_layers import build_layers
from pipeline.spec.fields import DEFAULT_SPLIT_BYTES
from pipeline.spec.layer import LayerSpec, fingerprint
from pipeline.spec.open_model import open_model
from pipeline.store.commit import DamagedStoreError
from pipeline.store.layout import (
    GROUP,
    INDEX,
    INDEX_SCHEMA,
    REJECTS,
    REJECTS_SCHEMA,
    digest_pairs,
    list_arrays,
)
from pipeline.store.snapshot import create_snapshot, read_snapshot
from pipeline.store.store import Store


@pytest.fixture
def store(copied_store):
    return Store.open(str(copied_store))


@pytest.fixture
def layers(store):
    return store.list_layers()


@pytest.fixture
def commit(store, layers):
    """The first task's latents commit."""
    return next(iter(store.newest_commits(layers[0].folder).values()))


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_layers_come_latents_first(layers, spec):
    assert [layer.kind for layer in layers] == ["latents", "features"]
    assert layers[0].latents == spec.latents
    assert layers[1].features == spec.features
    assert layers[1].latents_folder == layers[0].folder


def test_every_task_is_committed_in_both_layers(store, layers):
    latents, features = (store.newest_commits(layer.folder) for layer in layers)
    assert [task.rsplit("-", 1)[0] for task in latents] == [
        "scenes-train-00000",
        "scenes-train-00001",
        "scenes-val-00000",
    ]
    assert list(features) == list(latents)
    for task, commit in latents.items():
        assert commit.accounting.balanced
        assert commit.rows["views"] == commit.accounting.stored_samples == 4
        assert features[task].pairs_sha256 == commit.pairs_sha256
        assert features[task].rows == commit.rows


def test_a_commit_lists_exactly_the_files_that_are_there(store, layers):
    for layer in layers:
        for commit in store.newest_commits(layer.folder).values():
            folder = store.storage.root / commit.data_folder
            there = {p.relative_to(folder.parents[2]) for p in folder.rglob("*") if p.is_file()}
            assert {str(path) for path in there} == {file.path for file in commit.files}
            for file in commit.files:
                found = store.storage.digest(f"{layer.folder}/{file.path}")
                assert found == (file.num_bytes, file.sha256)


def test_plain_zarr_and_pyarrow_read_the_same(store, layers):
    for layer in layers:
        for commit in store.newest_commits(layer.folder).values():
            folder = store.storage.root / commit.data_folder
            group = zarr.open_group(folder / GROUP, mode="r")
            assert set(group.array_keys()) == set(list_arrays(layer))
            for name, plain in group.arrays():
                array = store.open_array(layer, commit, name)
                rows = [array.read_rows([row])[0] for row in range(array.num_rows)]
                np.testing.assert_array_equal(plain[:], np.stack(rows))
                assert plain.metadata.dimension_names == list_arrays(layer)[name].dimensions


def test_the_index_places_every_pair(store, layers, commit):
    index = store.read_index(commit)
    assert index.schema == INDEX_SCHEMA
    assert index.equals(pq.read_table(store.storage.root / commit.data_folder / INDEX))
    assert digest_pairs(index) == commit.pairs_sha256
    assert set(index["latent_row"].to_pylist()) == set(range(commit.rows["views"]))
    assert set(index["text_row"].to_pylist()) == set(range(1, commit.rows["prompts"]))
    mask = store.open_array(layers[0], commit, "mask")
    for row, area in enumerate(index["mask_area"].to_pylist()):
        values = mask.read_rows([row])[0]
        assert set(np.unique(values)) <= {0, 1}
        assert values.mean() == pytest.approx(area)


def test_the_rejects_are_a_table_beside(store, commit):
    rejects = store.read_parquet(commit, REJECTS)
    assert rejects.schema == REJECTS_SCHEMA
    assert rejects.num_rows == commit.accounting.rejected_samples == 0


@pytest.mark.parametrize("at", [0, 4, 1000, -1])
def test_an_altered_index_is_an_error(store, commit, at):
    path = store.storage.root / commit.data_folder / INDEX
    flip(path, at)
    with pytest.raises(DamagedStoreError, match=r"index\.parquet: SHA-256 is not the one"):
        store.read_index(commit)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DamagedStoreError, match=r"index\.parquet: SHA-256 is not the one"):
        store.read_index(commit)


def test_a_missing_index_is_an_error(store, commit):
    (store.storage.root / commit.data_folder / INDEX).unlink()
    with pytest.raises(DamagedStoreError, match=r"index\.parquet: a committed file is missing"):
        store.read_index(commit)


def test_a_file_that_the_record_does_not_list_is_an_error(store, commit):
    less = tuple(file for file in commit.files if not file.path.endswith(INDEX))
    with pytest.raises(DamagedStoreError, match=r"index\.parquet: SHA-256 is not the one"):
        store.read_index(commit.model_copy(update={"files": less}))


def test_an_index_with_another_number_of_rows_is_an_error(store, commit):
    other = commit.model_copy(update={"rows": commit.rows | {"pairs": 99}})
    with pytest.raises(DamagedStoreError, match=r"index\.parquet: expected 99 rows, got"):
        store.read_index(other)


def test_altered_array_metadata_are_an_error(store, layers, commit):
    """Even where they agree with themselves: the same values in another shape."""
    path = store.storage.root / commit.data_folder / GROUP / "latent_mean" / "zarr.json"
    text = path.read_text()
    metadata = json.loads(text)
    for shape in (
        metadata["shape"],
        metadata["chunk_grid"]["configuration"]["chunk_shape"],
        metadata["codecs"][0]["configuration"]["chunk_shape"],
    ):
        shape[1], shape[2] = shape[2], shape[1]
    path.write_text(json.dumps(metadata, indent=2) + "\n")
    with pytest.raises(DamagedStoreError, match=r"latent_mean/zarr\.json: SHA-256 is not"):
        store.open_array(layers[0], commit, "latent_mean")
    path.unlink()
    with pytest.raises(DamagedStoreError, match=r"zarr\.json: a committed file is missing"):
        store.open_array(layers[0], commit, "latent_mean")


def test_an_array_that_the_layer_lacks_is_named(store, layers, commit):
    with pytest.raises(SpecError, match="holds no array 'block06', only latent_mean, latent_log"):
        store.open_array(layers[0], commit, "block06")


def test_a_layer_is_added_once(store, layers):
    before = store.storage.read(f"{layers[0].folder}/spec.json")
    store.add_layer(layers[0])
    moved = layers[0].model_copy(update={"source": {**layers[0].source, "model": "elsewhere"}})
    store.add_layer(moved)  # where the model lay is not what it is
    assert store.storage.read(f"{layers[0].folder}/spec.json") == before


@pytest.mark.parametrize("given", ["models/tiny", "{copy}/models/tiny", "./models/tiny"])
def test_a_model_in_a_jobs_copy_is_recorded_as_the_project_has_it(
    tmp_path, ldm_folder, spec, monkeypatch, caplog, given
):
    """Ray deletes the copy; the layer is opened in the user's checkout, by the same path."""
    copy = tmp_path / "session" / JOB_COPIES / "_ray_pkg_0123"
    for place in (copy, tmp_path / "checkout"):
        shutil.copytree(ldm_folder, place / "models" / "tiny")
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    monkeypatch.chdir(copy)
    latents = spec.latents.model_copy(update={"model": given.format(copy=copy)})
    layer, _ = build_layers(spec.model_copy(update={"latents": latents}))
    assert layer.fingerprint == build_layers(spec)[0].fingerprint
    assert Path(layer.source["model"]) == copy / "models" / "tiny"  # for workers of this run
    store = Store.open(str(tmp_path / "store"))
    store.add_layer(layer)
    assert "is recorded as models/tiny" in caplog.text
    assert JOB_COPIES.encode() not in store.storage.read(f"{layer.folder}/spec.json")

    monkeypatch.delenv(JOB_VARIABLE)
    monkeypatch.chdir(tmp_path / "checkout")
    shutil.rmtree(tmp_path / "session")
    recorded = store.read_layer(layer.folder)
    assert recorded.source["model"] == "models/tiny"
    assert open_model(recorded) == Path("models/tiny")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelFilesError, match=rf"(?s)models/tiny.* from {tmp_path}.*head\.model in"
    ):
        open_model(recorded)


@pytest.mark.parametrize("model", ["{folder}", "org/model", "s3://bucket/working_dir_files/model"])
def test_another_model_of_a_job_is_recorded_as_it_is(
    tmp_path, layers, ldm_folder, monkeypatch, caplog, model
):
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    source = {**layers[0].source, "model": model.format(folder=ldm_folder)}
    store = Store.open(str(tmp_path / "new"))
    store.add_layer(layers[0].model_copy(update={"source": source}))
    assert store.read_layer(layers[0].folder).source == source
    assert caplog.text == ""


def test_a_new_layer_splits_tars_as_asked_and_a_later_run_as_the_layer(tmp_path, layers):
    store = Store.open(str(tmp_path / "new"))
    bare = layers[0].model_copy(update={"split_bytes": None})
    assert store.adopt_split(bare).split_bytes == DEFAULT_SPLIT_BYTES == 2**30
    chosen = store.adopt_split(bare, split_bytes=3 * 2**29)
    assert chosen.split_bytes == 3 * 2**29
    assert chosen.folder == bare.folder
    assert not (tmp_path / "new").exists()
    store.add_layer(chosen)
    store.add_layer(chosen)
    assert store.read_layer(bare.folder) == chosen
    for asked in (None, 3 * 2**29):
        assert store.adopt_split(bare, split_bytes=asked) == chosen
    message = (
        r"has them, 1\.5 GiB \(1610612736 bytes\), got 2 GiB \(2147483648 bytes\); .*--split-gb"
    )
    with pytest.raises(SpecError, match=message):
        store.adopt_split(bare, split_bytes=2**31)
    with pytest.raises(SpecError, match=message):  # the other run was first
        store.add_layer(bare.model_copy(update={"split_bytes": 2**31}))


def test_a_layer_from_before_tars_were_split_splits_none(tmp_path, layers):
    store = Store.open(str(tmp_path / "new"))
    old = layers[0].model_dump(mode="json", exclude={"split_bytes"})
    store.storage.create(f"{layers[0].folder}/spec.json", json.dumps(old).encode())
    assert store.adopt_split(layers[0]).split_bytes is None
    with pytest.raises(SpecError, match=r"as the layer has them, no split, got 1 GiB"):
        store.adopt_split(layers[0], split_bytes=2**30)


def test_a_missing_layer_is_named(store):
    with pytest.raises(SpecError, match="expected a layer 'latents-0000000000000000', got none"):
        store.read_layer("latents-0000000000000000")


def test_a_layer_of_a_later_version_is_refused(store, layers):
    path = store.storage.root / layers[0].folder / "spec.json"
    plain = json.loads(path.read_text()) | {"schema_version": 2, "unheard_of": True}
    path.write_text(json.dumps(plain))
    with pytest.raises(SpecError, match="schema version 2, this ldznet reads up to 1; install"):
        store.read_layer(layers[0].folder)


def test_a_layer_under_anothers_name_is_refused(store, layers):
    canonical = layers[0].canonical | {"scaling_factor": 2.0}
    other = LayerSpec.model_validate(
        layers[0].model_dump() | {"canonical": canonical, "fingerprint": fingerprint(canonical)}
    )
    path = store.storage.root / layers[0].folder / "spec.json"
    path.write_text(other.model_dump_json())
    with pytest.raises(DamagedStoreError, match=f"is the spec of {other.folder}"):
        store.read_layer(layers[0].folder)
    with pytest.raises(DamagedStoreError, match="is the spec of"):
        store.add_layer(layers[0])


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"{}", b"\xff\xfe\xfd", b'{"schema_version": null}', b"[" * 100_000]
)
def test_a_damaged_layer_spec_is_an_error(store, layers, data):
    (store.storage.root / layers[0].folder / "spec.json").write_bytes(data)
    with pytest.raises(DamagedStoreError, match=r"spec\.json: is not a layer's spec"):
        store.list_layers()


def test_any_flipped_byte_of_a_layers_canonical_spec_is_an_error(store, layers):
    path = store.storage.root / layers[0].folder / "spec.json"
    data = path.read_bytes()
    start, end = data.index(b'"canonical"'), data.index(b'"source"')
    for at in range(start, end, 7):
        flip(path, at)
        try:
            found = store.read_layer(layers[0].folder)
        except (DamagedStoreError, SpecError):
            pass
        else:
            assert found == layers[0], at  # white space alone
        path.write_bytes(data)


def test_folders_that_are_no_layers_are_not_listed(store, layers):
    (store.storage.root / "notes").mkdir()
    (store.storage.root / "latents-of-mine").mkdir()
    assert store.list_layers() == layers


def test_a_layer_with_commits_but_no_spec_is_an_error(store, layers):
    (store.storage.root / layers[0].folder / "spec.json").unlink()
    with pytest.raises(DamagedStoreError, match=r"spec\.json: is missing, but the layer has comm"):
        store.list_layers()
    store.add_layer(layers[0])
    assert store.list_layers() == layers


def test_an_empty_store_holds_nothing(tmp_path):
    store = Store.open(str(tmp_path / "none"))
    assert store.list_layers() == []
    assert store.newest_commits("latents-0000000000000000") == {}
    assert not (tmp_path / "none").exists()


def test_a_snapshot_is_read_back(store, layers):
    folders = [layer.folder for layer in layers]
    snapshot = create_snapshot(store, folders)
    assert read_snapshot(store, snapshot.digest) == snapshot
    assert create_snapshot(store, reversed(folders)) == snapshot
    assert set(snapshot.records) == set(folders)
    assert [len(records) for records in snapshot.records.values()] == [3, 3]
    assert list(store.storage.list_names("snapshots")) == [f"{snapshot.digest}.json"]


def test_a_snapshot_needs_no_hard_links(store, layers, monkeypatch):
    """Whoever trains from a store only reads it, perhaps on a mount of a bucket."""

    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    snapshot = create_snapshot(store, [layer.folder for layer in layers])
    assert create_snapshot(store, [layer.folder for layer in layers]) == snapshot
    assert read_snapshot(store, snapshot.digest) == snapshot
    assert list(store.storage.list_names("snapshots")) == [f"{snapshot.digest}.json"]


def test_a_snapshot_stays_while_the_store_grows(store, layers, commit):
    folder = layers[0].folder
    before = create_snapshot(store, [folder])
    repaired = commit.model_copy(update={"generation": 1})
    store.storage.create(repaired.name, repaired.model_dump_json().encode())
    after = create_snapshot(store, [folder])
    assert after.digest != before.digest
    assert read_snapshot(store, before.digest) == before
    assert after.records[folder][0].generation == 1


def test_a_snapshot_that_is_missing_or_altered_is_an_error(store, layers):
    with pytest.raises(SpecError, match="holds no snapshot '0123'"):
        read_snapshot(store, "0123")
    digest = create_snapshot(store, [layers[0].folder]).digest
    flip(store.storage.root / "snapshots" / f"{digest}.json", 60)
    with pytest.raises(DamagedStoreError, match="another digest than its name"):
        read_snapshot(store, digest)


def test_a_snapshot_of_a_later_version_is_refused(store):
    text = b'{"schema_version": 2, "commits": []}'
    digest = hashlib.sha256(text).hexdigest()[:16]
    store.storage.create(f"snapshots/{digest}.json", text)
    with pytest.raises(SpecError, match="schema version 2, this ldznet reads up to 1"):
        read_snapshot(store, digest)
