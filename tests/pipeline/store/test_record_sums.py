"""What a look at a store learns is kept, so that the next reads new records alone."""

import shutil

import pytest

from pipeline.bench.store import CountingStorage, write_records
from pipeline.storage.local import LocalStorage
from pipeline.store import records as record_sums
from pipeline.store.records import MAX_FILES
from pipeline.store.store import Store
from pipeline.upkeep.inspect import StoreInspector

NUM = 30
_KEPT = "*/inventory/sums-*.feather"


@pytest.fixture(autouse=True)
def _keep_few(monkeypatch):
    monkeypatch.setattr(record_sums, "MIN_KEPT", 10)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "store"
    write_records(folder, NUM)
    return folder


@pytest.fixture
def folder(tmp_path, shared_folder):
    return shutil.copytree(shared_folder, tmp_path / "store")


def look(folder, **options):
    """The layers, and how many requests a look by a fresh process would take."""
    storage = CountingStorage(LocalStorage(folder))
    return StoreInspector(Store(storage)).look(**options).layers, storage.num_requests


def test_a_second_look_reads_no_record(folder):
    first, many = look(folder)
    second, few = look(folder)
    assert [layer.as_dict() for layer in second] == [layer.as_dict() for layer in first]
    assert [layer.rows["pairs"] for layer in second] == [100 * NUM, 100 * NUM]
    assert many > 2 * NUM
    assert few < 20
    assert [layer.num_read for layer in look(folder, fast=True)[0]] == [NUM, NUM]


def test_what_was_removed_is_not_counted_though_it_is_known(folder):
    look(folder)
    for record in sorted(folder.glob("latents-*/commits/*.json"))[:7]:
        record.unlink()
    latents, features = look(folder)[0]
    assert (latents.num_tasks, latents.rows["pairs"]) == (NUM - 7, 100 * (NUM - 7))
    assert features.num_tasks == NUM


def test_a_later_generation_is_another_record(folder):
    look(folder)
    record = next(folder.glob("latents-*/commits/*.0000.json"))
    record.with_name(record.name.replace(".0000.", ".0001.")).write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match=r"0001\.json: the commit record cannot be read"):
        look(folder)


def test_a_damaged_file_is_not_used(folder, caplog):
    look(folder)
    for kept in folder.glob(_KEPT):
        data = bytearray(kept.read_bytes())
        data[len(data) // 2] ^= 1
        kept.write_bytes(data)
    layers, requests = look(folder)
    assert [layer.rows["pairs"] for layer in layers] == [100 * NUM, 100 * NUM]
    assert requests > 2 * NUM
    assert "is damaged and not used" in caplog.text


def test_many_files_become_one(folder, monkeypatch):
    monkeypatch.setattr(record_sums, "READ_AT_ONCE", 1)
    monkeypatch.setattr(record_sums, "MIN_KEPT", 1)
    layers = look(folder)[0]
    kept = [path.parts[-3] for path in folder.glob(_KEPT)]
    assert all(1 <= kept.count(layer.folder) <= MAX_FILES for layer in layers)
    again, requests = look(folder)
    assert [layer.rows for layer in again] == [layer.rows for layer in layers]
    assert requests < 60


class ReadOnly(CountingStorage):
    """As a bucket is to a reader without a right to write."""

    def create(self, path, data):
        raise PermissionError(f"{path}: denied")


def test_a_store_that_may_not_be_written_is_looked_at_all_the_same(folder):
    inspector = StoreInspector(Store(ReadOnly(LocalStorage(folder))))
    assert [layer.num_read for layer in inspector.look().layers] == [NUM, NUM]
    assert [layer.num_read for layer in inspector.look(fast=True).layers] == [NUM, NUM]
    assert not list(folder.glob(_KEPT))
