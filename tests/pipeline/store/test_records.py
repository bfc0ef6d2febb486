"""The inventory: sources of records without reading them again; a cache that may be lost."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.store.records
from pipeline.store.commit import list_records, read_commit
from pipeline.store.records import MAX_FILES, read_origins
from pipeline.store.store import Store


@pytest.fixture
def store(copied_store):
    return Store.open(str(copied_store))


@pytest.fixture
def layer(store):
    return store.list_layers()[0].folder


@pytest.fixture
def folder(copied_store, layer):
    """Where the layer's inventory lies, emptied."""
    shutil.rmtree(copied_store / layer / "inventory", ignore_errors=True)
    return copied_store / layer / "inventory"


@pytest.fixture
def reads(monkeypatch):
    """The records that are read, in a list."""
    names = []

    def count(storage, layer, record):
        names.append((record.task, record.generation))
        return read_commit(storage, layer, record)

    monkeypatch.setattr(pipeline.store.records, "read_commit", count)
    return names


def expected(store, layer):
    return {
        task: (commit.source.url, commit.source.head_sha256)
        for task, commit in store.newest_commits(layer).items()
    }


def read(store, layer):
    origins, errors = read_origins(store, layer, list_records(store.storage, layer))
    return {task: (o.url, o.head_sha256) for task, o in origins.items()}, errors


def test_records_are_read_once(store, layer, folder, reads):
    assert read(store, layer) == (expected(store, layer), {})
    assert len(reads) == 3
    assert len(list(folder.iterdir())) == 1
    assert read(store, layer) == (expected(store, layer), {})
    assert len(reads) == 3
    assert len(list(folder.iterdir())) == 1


def test_no_records_write_nothing(store, layer, folder):
    assert read_origins(store, layer, {}) == ({}, {})
    assert not folder.exists()


def test_only_what_is_new_is_read_and_a_new_generation_is_new(
    store, layer, folder, reads, copied_store
):
    read(store, layer)
    task, commit = next(iter(store.newest_commits(layer).items()))
    source = commit.source.model_copy(update={"url": "file:///elsewhere"})
    newer = commit.model_copy(update={"generation": 1, "source": source})
    (copied_store / newer.name).write_text(newer.model_dump_json())
    reads.clear()
    assert read(store, layer)[0][task][0] == "file:///elsewhere"
    assert reads == [(task, 1)]
    assert len(list(folder.iterdir())) == 2


def test_a_record_that_cannot_be_read_is_an_error_of_its_task_each_time(
    store, layer, folder, copied_store
):
    tasks = list(expected(store, layer))
    commit = store.newest_commits(layer)[tasks[1]]
    (copied_store / commit.name).write_text("{")
    for _ in range(2):
        origins, errors = read(store, layer)
        assert sorted(origins) == [tasks[0], tasks[2]]
        assert list(errors) == [tasks[1]]
        assert "the commit record cannot be read" in errors[tasks[1]]
    (copied_store / commit.name).write_text(
        commit.model_copy(update={"source": None}).model_dump_json()
    )
    assert "names no source" in read(store, layer)[1][tasks[1]]


def test_a_storage_that_fails_is_no_fault_of_the_task(store, layer, folder, monkeypatch):
    def denied(storage, layer, record):
        raise PermissionError("HTTP 403")

    monkeypatch.setattr(pipeline.store.records, "read_commit", denied)
    with pytest.raises(PermissionError, match="HTTP 403"):
        read(store, layer)
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_file_is_not_used_and_is_written_anew(
    store, layer, folder, reads, caplog, damage
):
    read(store, layer)
    (path,) = folder.iterdir()
    sound = path.read_bytes()
    broken = bytearray(sound)
    broken[len(broken) // 2] ^= 1
    path.write_bytes({"flipped": bytes(broken), "cut": sound[:-9], "empty": b""}[damage])
    assert read(store, layer) == (expected(store, layer), {})
    assert len(reads) == 6
    assert "is damaged; removed" in caplog.text
    assert path.read_bytes() == sound  # the same facts have the same name
    read(store, layer)
    assert len(reads) == 6


def write_parts(store, layer, num):
    """Inventory files of one foreign task each."""
    for number in range(num):
        origin = pipeline.store.records.Origin(f"file:///{number}", "0" * 64)
        pipeline.store.records._write_inventory(store, layer, {(f"other-{number}", 0): origin})


def test_many_files_become_one_that_holds_all(store, layer, folder, reads):
    write_parts(store, layer, MAX_FILES)
    read(store, layer)
    assert len(list(folder.iterdir())) == MAX_FILES + 1
    read(store, layer)
    (path,) = folder.iterdir()
    assert pq.read_table(path).num_rows == MAX_FILES + 3
    assert read(store, layer) == (expected(store, layer), {})
    assert len(reads) == 3


def test_a_file_that_holds_all_already_is_not_removed_with_the_others(store, layer, folder, reads):
    write_parts(store, layer, MAX_FILES)
    read(store, layer)
    parts = {path: path.read_bytes() for path in folder.iterdir()}
    read(store, layer)
    (joined,) = folder.iterdir()
    for path, data in parts.items():  # as a racer's, listed before ours were removed
        path.write_bytes(data)
    read(store, layer)
    assert list(folder.iterdir()) == [joined]
    assert len(reads) == 3


def test_a_file_that_goes_meanwhile_is_read_from_the_records(store, layer, folder, reads):
    """Another run joins the files between our listing and our reading."""
    read(store, layer)
    (path,) = folder.iterdir()
    names = store.storage.list_names

    def list_and_remove(folder):
        found = list(names(folder))
        path.unlink()
        return found

    store.storage.list_names = list_and_remove
    records = list_records(Store.open(store.storage.url).storage, layer)
    origins, errors = read_origins(store, layer, records)
    assert (len(origins), errors, len(reads)) == (3, {}, 6)


def test_the_schema_is_what_is_written(store, layer, folder):
    read(store, layer)
    (path,) = folder.iterdir()
    assert pq.read_schema(path).equals(pipeline.store.records.INVENTORY_SCHEMA)
    assert pq.read_table(path)["generation"].type == pa.int32()
