"""The table of records: each record is read once by all; a cache, which may be lost or damaged."""

import hashlib
import shutil
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.store.records
from pipeline.bench.store import CountingStorage, write_records
from pipeline.read.reader import PairReader
from pipeline.read.source import open_layers
from pipeline.storage.local import LocalStorage
from pipeline.store.commit import DamagedStoreError, list_records
from pipeline.store.kept_table import MAX_FILES, KeptTable
from pipeline.store.records import RECORDS_SCHEMA, RecordTable, inventory_folder
from pipeline.store.store import Store
from pipeline.upkeep.inspect import StoreInspector
from pipeline.upkeep.verify import verify_store

NUM = 30
_KEPT = "*/inventory/records-3-*.table"


@pytest.fixture(autouse=True)
def _keep_few(monkeypatch):
    monkeypatch.setattr(pipeline.store.records, "MIN_KEPT", 1)


@pytest.fixture
def store(copied_store):
    return Store.open(str(copied_store))


@pytest.fixture
def layer(store):
    return store.list_layers()[0].folder


@pytest.fixture
def folder(copied_store, layer):
    """Where the layer's table lies, emptied."""
    shutil.rmtree(copied_store / layer / "inventory", ignore_errors=True)
    return copied_store / layer / "inventory"


@pytest.fixture
def reads(monkeypatch):
    """The records that are read, in a list."""
    names = []
    read_row = pipeline.store.records._read_row

    def count(store, layer, record):
        names.append((record.task, record.generation))
        return read_row(store, layer, record)

    monkeypatch.setattr(pipeline.store.records, "_read_row", count)
    return names


def expected(store, layer):
    return {
        task: (commit.source.url, commit.source.head_sha256, commit.rows["pairs"], commit.num_bytes)
        for task, commit in store.newest_commits(layer).items()
    }


def read(store, layer, *, faults=None, columns=RECORDS_SCHEMA.names):
    """Task → what the table says of its newest record, of those that can be read."""
    records = list(list_records(store.storage, layer).values())
    table = RecordTable(store, layer, columns)
    table.read(records, faults=faults)
    rows = table.select(records).to_pylist()
    return {
        record.task: (row["url"], row["head_sha256"], row["pairs"], row["num_bytes"])
        for record, row in zip(records, rows, strict=True)
        if row["record"] is not None
    }


def test_records_are_read_once(store, layer, folder, reads):
    assert read(store, layer) == expected(store, layer)
    assert len(reads) == 3
    assert len(list(folder.iterdir())) == 1
    assert read(store, layer) == expected(store, layer)
    assert len(reads) == 3
    assert len(list(folder.iterdir())) == 1


def test_no_records_write_nothing(store, layer, folder):
    table = RecordTable(store, layer)
    table.read([])
    assert table.select([]).num_rows == 0
    assert not folder.exists()


def test_few_rows_are_not_worth_a_file(store, layer, folder, reads, monkeypatch):
    monkeypatch.setattr(pipeline.store.records, "MIN_KEPT", 4)
    for _ in range(2):
        assert read(store, layer) == expected(store, layer)
    assert len(reads) == 6
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
    assert read(store, layer)[task][0] == "file:///elsewhere"
    assert reads == [(task, 1)]
    assert len(list(folder.iterdir())) == 2


def test_a_record_that_cannot_be_read_is_a_fault_of_its_task_each_time(
    store, layer, folder, copied_store
):
    tasks = list(expected(store, layer))
    commit = store.newest_commits(layer)[tasks[1]]
    (copied_store / commit.name).write_text("{")
    for _ in range(2):
        faults = {}
        assert sorted(read(store, layer, faults=faults)) == [tasks[0], tasks[2]]
        assert list(faults) == [tasks[1]]
        assert "the commit record cannot be read" in faults[tasks[1]]
        with pytest.raises(DamagedStoreError, match="the commit record cannot be read"):
            read(store, layer)


@pytest.mark.parametrize(
    "change",
    [
        {"task": "other"},
        {"generation": 7},
        {"layer": "latents-0"},
        {"schema_version": 0},
        {"rows": {"pairs": -1, "views": 1, "prompts": 1}},
        {"rows": {"pairs": 1, "views": 1}},
    ],
)
def test_a_record_of_another_or_of_no_sense_is_refused(store, layer, folder, copied_store, change):
    commit = next(iter(store.newest_commits(layer).values()))
    altered = commit.model_copy(update=change)
    (copied_store / commit.name).write_text(altered.model_dump_json())
    with pytest.raises(DamagedStoreError, match=commit.name.rsplit("/", 1)[-1]):
        read(store, layer)


def test_a_storage_that_fails_is_no_fault_of_the_task(store, layer, folder, monkeypatch):
    def denied(path):
        raise PermissionError("HTTP 403")

    records = list(list_records(store.storage, layer).values())
    monkeypatch.setattr(store.storage, "read", denied)
    with pytest.raises(PermissionError, match="HTTP 403"):
        RecordTable(store, layer).read(records, faults={})
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
    assert read(store, layer) == expected(store, layer)
    assert len(reads) == 6
    assert "is damaged and not used" in caplog.text
    assert path.read_bytes() == sound  # the same facts have the same name
    read(store, layer)
    assert len(reads) == 6


def write_parts(store, layer, num):
    """Files of one row each, of tasks that are not there."""
    for number in range(num):
        row = dict.fromkeys(RECORDS_SCHEMA.names) | {"record": f"other-{number}.0000"}
        kept = KeptTable(store.storage, inventory_folder(layer), "records-3", RECORDS_SCHEMA)
        kept.add(pa.Table.from_pylist([row], schema=RECORDS_SCHEMA))


@pytest.mark.parametrize("case", ["no folder", "a folder", "no table"])
def test_what_cannot_be_read_is_not_used(store, layer, folder, reads, caplog, case):
    """The table is a cache: whatever stands in its place, the records are read."""
    if case == "no folder":
        folder.write_text("a file")
    elif case == "a folder":
        (folder / "records-3-0123456789abcdef.table").mkdir(parents=True)
    else:
        folder.mkdir()
        data = b"no table, but of the digest that its name says"
        (folder / f"records-3-{hashlib.sha256(data).hexdigest()[:16]}.table").write_bytes(data)
    records = list(list_records(store.storage, layer).values())
    table = RecordTable(store, layer)
    table.read(records)
    assert table.select(records)["pairs"].null_count == 0
    assert len(reads) == len(records)
    assert "it is a cache" in caplog.text
    assert [check.damage for check in verify_store(store)] == [[]] * 6


def test_many_files_become_one_that_holds_all(store, layer, folder, reads):
    write_parts(store, layer, MAX_FILES)
    assert len(list(folder.iterdir())) == MAX_FILES
    read(store, layer, columns=("url", "head_sha256", "pairs", "num_bytes"))
    (path,) = folder.iterdir()
    assert pq.read_table(path).num_rows == MAX_FILES + 3
    assert read(store, layer) == expected(store, layer)
    assert len(reads) == 3


def test_a_file_that_goes_meanwhile_is_read_from_the_records(store, layer, folder, reads):
    """Another run joins the files between our listing and our reading."""
    read(store, layer)
    (path,) = folder.iterdir()
    records = list(list_records(store.storage, layer).values())
    names = store.storage.list_names

    def list_and_remove(folder):
        found = list(names(folder))
        path.unlink(missing_ok=True)
        return found

    store.storage.list_names = list_and_remove
    table = RecordTable(store, layer)
    table.read(records)
    assert table.count_unread(records) == 0
    assert len(reads) == 6


def test_the_schema_is_what_is_written(store, layer, folder):
    read(store, layer)
    (path,) = folder.iterdir()
    assert pq.read_schema(path).equals(RECORDS_SCHEMA)
    rows = pq.read_table(path).to_pylist()
    assert all(row["committed_s"] > 0 and row["samples"] >= row["stored_samples"] for row in rows)


def test_tables_of_other_versions_are_not_read(store, layer, folder, reads):
    """Those of earlier ldznet, and those of later ones."""
    folder.mkdir()
    for name in ("0123456789abcdef.parquet", "sums-0123.feather", "records-3-0123.parquet"):
        (folder / name).write_bytes(b"of another version")
    read(store, layer)
    assert len(reads) == 3
    assert len(list(folder.iterdir())) == 4


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "store"
    write_records(folder, NUM)
    return folder


@pytest.fixture
def bench_folder(tmp_path, shared_folder):
    return shutil.copytree(shared_folder, tmp_path / "store")


def look(folder, **options):
    """The layers, and how many requests a look by a fresh process would take."""
    storage = CountingStorage(LocalStorage(folder))
    return StoreInspector(Store(storage)).summarise(**options).layers, storage.num_requests


def open_reader(folder, **options):
    """A reader of every pair, and how many requests opening it took."""
    storage = CountingStorage(LocalStorage(folder))
    reader = PairReader(
        open_layers(Store(storage)),
        tasks="*",
        inputs=frozenset({"latent", "features"}),
        blocks=(6,),
    )
    return reader, storage.num_requests


def test_a_second_look_reads_no_record(bench_folder):
    first, many = look(bench_folder)
    second, few = look(bench_folder)
    assert [asdict(layer) for layer in second] == [asdict(layer) for layer in first]
    assert [layer.rows["pairs"] for layer in second] == [100 * NUM, 100 * NUM]
    assert many > 2 * NUM
    assert few < 20
    assert [layer.num_read for layer in look(bench_folder, fast=True)[0]] == [NUM, NUM]


@pytest.mark.parametrize("first", [look, open_reader])
def test_whoever_reads_records_first_spares_the_others(bench_folder, first):
    assert first(bench_folder)[1] > 2 * NUM
    reader, requests = open_reader(bench_folder)
    assert len(reader) == 100 * NUM
    assert len(reader.tasks) == NUM
    assert requests < 20
    assert look(bench_folder)[1] < 20


def test_a_reader_of_a_damaged_table_says_so_when_a_task_is_opened(store, layer, folder):
    """A row that was altered and sealed anew: its record is read before any array."""
    read(store, layer)
    (path,) = folder.iterdir()
    rows = pq.read_table(path).to_pylist()
    path.unlink()
    altered = [row | {name: row[name] + 1 for name in ("pairs", "masks")} for row in rows]
    kept = KeptTable(store.storage, inventory_folder(layer), "records-3", RECORDS_SCHEMA)
    kept.add(pa.Table.from_pylist(altered, schema=RECORDS_SCHEMA))
    reader = PairReader(open_layers(store), tasks="*", inputs=frozenset({"latent"}))
    assert len(reader) == sum(row["pairs"] + 1 for row in rows)
    with pytest.raises(
        DamagedStoreError, match=r"the table of records says .* cache: remove .*/inventory"
    ):
        reader.read([0], draws=[0])


def test_what_was_removed_is_not_counted_though_it_is_known(bench_folder):
    look(bench_folder)
    for record in sorted(bench_folder.glob("latents-*/commits/*.json"))[:7]:
        record.unlink()
    latents, features = look(bench_folder)[0]
    assert (latents.num_tasks, latents.rows["pairs"]) == (NUM - 7, 100 * (NUM - 7))
    assert features.num_tasks == NUM - 7  # without latents nothing can read them


def test_a_later_generation_is_another_record(bench_folder):
    look(bench_folder)
    record = next(bench_folder.glob("latents-*/commits/*.0000.json"))
    record.with_name(record.name.replace(".0000.", ".0001.")).write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match=r"0001\.json: the commit record cannot be read"):
        look(bench_folder)


def test_rows_are_kept_as_they_come_and_files_are_few(bench_folder, monkeypatch):
    monkeypatch.setattr(pipeline.store.records, "READ_AT_ONCE", 1)
    layers = look(bench_folder)[0]
    kept = [path.parts[-3] for path in bench_folder.glob(_KEPT)]
    assert all(1 <= kept.count(layer.folder) <= MAX_FILES for layer in layers)
    again, requests = look(bench_folder)
    assert [layer.rows for layer in again] == [layer.rows for layer in layers]
    assert requests < 60


class ReadOnly(CountingStorage):
    """As a bucket is to a reader without a right to write."""

    def create(self, path, data):
        raise PermissionError(f"{path}: denied")

    write_content = create


def test_a_store_that_may_not_be_written_is_looked_at_all_the_same(bench_folder):
    inspector = StoreInspector(Store(ReadOnly(LocalStorage(bench_folder))))
    assert [layer.num_read for layer in inspector.summarise().layers] == [NUM, NUM]
    assert [layer.num_read for layer in inspector.summarise(fast=True).layers] == [NUM, NUM]
    assert not list(bench_folder.glob(_KEPT))
