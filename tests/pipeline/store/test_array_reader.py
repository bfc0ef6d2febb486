"""Reading chunks: exact values or an error that names the file, never a fill value."""

import copy
import json
import os
import resource
import tracemalloc
from functools import partial
from operator import attrgetter

import numpy as np
import pytest

from pipeline.base.lru_cache import LruCache
from pipeline.storage import local as local_storage
from pipeline.storage.local import LocalStorage
from pipeline.store import array_writer as shards
from pipeline.store.array_reader import ShardedArray
from pipeline.store.array_writer import CRC_BYTES, INDEX_ENTRY_BYTES, MISSING, ArrayWriter, crc32c
from pipeline.store.commit import DamagedStoreError
from pipeline.store.layout import ArrayKind
from pipeline.store.row_memory import RowMemory
from pipeline.store.shard_index import ShardIndex, keep_indexes

KIND = ArrayKind("float16", ("pair", "draw", "channel", "y", "x"), split_rows=True)
MASK = ArrayKind("uint8", ("pair", "y", "x"), compressed=True)
ROW_SHAPE = (2, 3, 4, 4)
SHARD = "g/block06/c/0/0/0/0/0"
INDEX_BYTES = 8 * INDEX_ENTRY_BYTES + CRC_BYTES  # a shard: 4 rows of 2 draws


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 * 2 * 3 * 4 * 4 * 2)


@pytest.fixture
def rows():
    return np.random.default_rng(0).standard_normal((6, *ROW_SHAPE)).astype(np.float16)


@pytest.fixture
def storage(tmp_path, rows):
    storage = LocalStorage(tmp_path)
    write(storage, KIND.schema("block06", ROW_SHAPE), rows)
    return storage


def write(storage, schema, rows):
    writer = ArrayWriter(storage, "g", schema)
    writer.append_rows(rows)
    writer.close()


def open_array(storage, name="block06", kind=KIND, *, num_rows=6, metadata=None):
    found = storage.read(f"g/{name}/zarr.json") if metadata is None else metadata
    return ShardedArray(storage, f"g/{name}", kind, num_rows=num_rows, metadata=found)


def test_rows_are_read_as_written(storage, rows):
    array = open_array(storage)
    for row in (5, 0, 3, 4):
        np.testing.assert_array_equal(array.read_rows([row])[0], rows[row])


@pytest.mark.parametrize("order", [[], [3], [5, 0, 3, 4], [1, 1, 5, 1], [0, 1, 2, 3, 4, 5]])
def test_rows_together_are_as_each_alone(storage, rows, order):
    found = open_array(storage).read_rows(order)
    assert found.shape == (len(order), *ROW_SHAPE)
    np.testing.assert_array_equal(found, rows[order])
    assert found.dtype == np.float16
    assert not found.flags.writeable
    again = open_array(storage).read_rows(np.array(order, dtype=np.int32))
    np.testing.assert_array_equal(again, rows[order])


def test_compressed_rows_are_read_together(tmp_path):
    storage = LocalStorage(tmp_path)
    masks = np.random.default_rng(1).integers(0, 2, (9, 8, 8)).astype(np.uint8)
    masks[4] = 0  # so that the chunks differ in size
    write(storage, MASK.schema("mask", (8, 8)), masks)
    order = [8, 4, 0, 4, 1]
    found = open_array(storage, "mask", MASK, num_rows=9).read_rows(order)
    np.testing.assert_array_equal(found, masks[order])


class CountsReads(LocalStorage):
    """Keeps what ranges are read to memory."""

    def __init__(self, root):
        super().__init__(root)
        self.reads = []

    def read_into(self, path, parts):
        self.reads += [(path, start, sum(map(len, memories))) for start, memories in parts]
        return super().read_into(path, parts)


def test_a_stored_row_is_read_once_and_adjacent_ones_together(storage, rows):
    counting = CountsReads(storage.root)
    found = open_array(counting).read_rows([2, 0, 4, 1, 1, 0])
    np.testing.assert_array_equal(found, rows[[2, 0, 4, 1, 1, 0]])
    chunk_bytes = 3 * 4 * 4 * 2 + CRC_BYTES
    second = SHARD.replace("/c/0", "/c/1")
    assert sorted(counting.reads) == [(SHARD, 0, 6 * chunk_bytes), (second, 0, 2 * chunk_bytes)]
    counting.reads.clear()
    open_array(counting).read_rows([3, 1])
    assert [start for _, start, _ in counting.reads] == [2 * chunk_bytes, 6 * chunk_bytes]


def test_rows_that_are_not_there_are_an_index_error_among_others(storage):
    for order in ([0, 6], [-1, 0]):
        with pytest.raises(IndexError, match=r"no row (6|-1), split 0 in 6 rows"):
            open_array(storage).read_rows(order)


def test_one_damaged_row_among_many_is_named(storage):
    path = storage.local_path(SHARD)
    data = bytearray(path.read_bytes())
    data[(3 * 4 * 4 * 2 + CRC_BYTES) * 5 + 7] ^= 1  # row 2, split 1
    path.write_bytes(data)
    with pytest.raises(DamagedStoreError, match=f"{SHARD}: row 2, split 1: the chunk's CRC-32C"):
        open_array(storage).read_rows([5, 0, 1, 2, 3])


def test_chunks_are_read_to_any_memory(storage, rows):
    array = open_array(storage)
    out = np.zeros((5, 3, 4, 4), np.float16)
    for read in array.plan_reads([4, 0, 4], [1, 0, 1], [3, 1, 2], RowMemory(out)):
        read()
    np.testing.assert_array_equal(out[[3, 1, 2]], rows[[4, 0, 4], [1, 0, 1]])
    assert not out[[0, 4]].any()


def test_memory_that_held_the_chunk_does_not_hide_a_cut_shard(storage, rows):
    """Reused buffers still hold what was read before, with a sum that fits."""
    array = open_array(storage)
    (read,) = array.plan_reads([0], None, [0], RowMemory(np.zeros((1, 3, 4, 4), np.float16)))
    read()
    storage.local_path(SHARD).write_bytes(b"")
    with pytest.raises(DamagedStoreError, match="row 0, split 0: the chunk's CRC-32C differs"):
        read()


@pytest.mark.parametrize(("row", "split"), [(-1, 0), (6, 0), (0, -1), (0, 2)])
def test_rows_that_are_not_there_are_an_index_error(storage, row, split):
    memory = RowMemory(np.zeros((1, 3, 4, 4), np.float16))
    with pytest.raises(IndexError, match=f"no row {row}, split {split} in 6 rows"):
        open_array(storage).plan_reads([row], [split], [0], memory)


def test_an_empty_array_has_no_rows(tmp_path):
    storage = LocalStorage(tmp_path)
    write(storage, MASK.schema("mask", (8, 8)), np.zeros((0, 8, 8), np.uint8))
    with pytest.raises(IndexError):
        open_array(storage, "mask", MASK, num_rows=0).read_rows([0])[0]


def change_at(path, value):
    *parents, last = path

    def change(metadata):
        for name in parents:
            metadata = metadata[name]
        metadata[last] = value

    return change


SHARDING = ("codecs", 0, "configuration")
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


@pytest.mark.parametrize(
    "change",
    [
        change_at((*SHARDING, "codecs", 1), {"name": "adler32"}),
        change_at((*SHARDING, "codecs"), [{"name": "bytes", "configuration": {"endian": "big"}}]),
        change_at((*SHARDING, "codecs"), [{"name": "numcodecs.pickle"}]),
        change_at((*SHARDING, "codecs"), [LITTLE, {"name": "zstd"}, {"name": "crc32c"}]),
        change_at((*SHARDING, "index_location"), "start"),
        change_at((*SHARDING, "index_codecs"), [{"name": "bytes"}]),
        change_at((*SHARDING, "chunk_shape"), [1, 2, 3, 4, 4]),
        change_at(("codecs",), [{"name": "bytes"}]),
        change_at(("codecs",), [LITTLE, {"name": "blosc"}]),
        change_at(("chunk_key_encoding", "name"), "v2"),
        change_at(("chunk_key_encoding", "configuration", "separator"), "."),
        change_at(("data_type",), "float32"),
        change_at(("data_type",), "bfloat16"),
        change_at(("shape", 0), 7),
        change_at(("shape", 0), 2**40),
        change_at(("shape", 1), 3),
        change_at(("shape",), [6, 2, 3, 4]),
        change_at(("shape",), [6]),
        change_at(("shape",), [6, 2, 3, 4, 0]),
        change_at(("shape",), [6, 2, 3, 4, -4]),
        change_at(("shape",), [6, 2**32, 2**32, 2**32, 2**32]),
        change_at(("shape", 1), float("inf")),
        change_at(("shape",), "all"),
        change_at(("chunk_grid", "configuration", "chunk_shape", 0), 3),
        change_at(("chunk_grid", "configuration", "chunk_shape", 0), 0),
        change_at(("chunk_grid", "configuration", "chunk_shape", 0), 5),
        change_at(("chunk_grid", "name"), "rectangular"),
        change_at(("fill_value",), 0.0),
        change_at(("storage_transformers",), [{"name": "encrypt"}]),
        change_at(("zarr_format",), 2),
        change_at(("node_type",), "group"),
        change_at(("attributes",), {"scale": 2}),
        change_at(("more",), 1),
    ],
)
def test_other_metadata_are_refused(storage, change):
    metadata = json.loads(storage.read("g/block06/zarr.json"))
    change(metadata)
    # A smaller shard size, which the schema allows, shows at the shard's index.
    with pytest.raises(DamagedStoreError, match=r"^g/block06(/zarr\.json|/c/0)"):
        open_array(storage, metadata=json.dumps(metadata).encode()).read_rows([0])[0]


def test_what_another_writer_encoded_is_refused_with_what_to_do(storage):
    metadata = json.loads(storage.read("g/block06/zarr.json"))
    metadata["fill_value"] = 0.0
    with pytest.raises(
        DamagedStoreError,
        match=r'expected \{"fill_value": "NaN"\}, got \{"fill_value": 0.0\}; only arrays that '
        r"ldznet has written are read.*encode the task anew .*--repair FILE",
    ):
        open_array(storage, metadata=json.dumps(metadata).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"{}", b"null", b'{"shape": [1]}'])
def test_metadata_that_are_no_array_are_refused(storage, data):
    with pytest.raises(DamagedStoreError, match=r"g/block06/zarr\.json: cannot be read"):
        open_array(storage, metadata=data)


def test_every_key_of_the_metadata_matters(storage):
    whole = json.loads(storage.read("g/block06/zarr.json"))
    for key in whole:
        less = copy.deepcopy(whole)
        del less[key]
        with pytest.raises(DamagedStoreError, match=r"g/block06/zarr\.json"):
            open_array(storage, metadata=json.dumps(less).encode())


def test_a_missing_shard_is_an_error(storage, rows, monkeypatch):
    monkeypatch.setattr(local_storage, "_CHECK_S", 0.0)  # else it is read for up to a second
    array = open_array(storage)
    np.testing.assert_array_equal(array.read_rows([0])[0], rows[0])
    storage.local_path(SHARD).unlink()
    for reader in (array, open_array(storage)):
        with pytest.raises(DamagedStoreError, match=f"{SHARD}: a committed shard is missing"):
            reader.read_rows([0])[0]
        np.testing.assert_array_equal(reader.read_rows([4])[0], rows[4])  # of the other shard


def rewrite_entry(storage, entry, values):
    """Replace one entry of the first shard's index, with a CRC-32C to match."""
    path = storage.local_path(SHARD)
    data = path.read_bytes()
    index = np.frombuffer(data[-INDEX_BYTES:-CRC_BYTES], dtype="<u8").reshape(-1, 2).copy()
    index[entry] = values
    path.write_bytes(data[:-INDEX_BYTES] + index.tobytes() + crc32c(index.tobytes()))


@pytest.mark.parametrize(
    "values",
    [
        (MISSING, MISSING),
        (0, MISSING),
        (MISSING, 100),
        (0, 0),
        (0, 3),
        (2**63, 2**63),
        (10**6, 100),
        (0, 10**6),
    ],
)
def test_a_chunk_that_the_index_lacks_is_an_error(storage, rows, values):
    rewrite_entry(storage, 2, values)
    array = open_array(storage)
    np.testing.assert_array_equal(array.read_rows([0])[0], rows[0])
    with pytest.raises(DamagedStoreError, match=f"{SHARD}: row 1, split 0: the chunk is missing"):
        array.read_rows([1])[0]


def test_an_index_that_points_astray_is_an_error(storage):
    rewrite_entry(storage, 2, (1, 100))
    with pytest.raises(DamagedStoreError, match=r"row 1, split 0: the chunk's CRC-32C differs"):
        open_array(storage).read_rows([1])[0]


@pytest.mark.parametrize("num_values", [0, 47, 49])
def test_a_sound_chunk_of_another_size_is_an_error(storage, num_values):
    data = np.zeros(num_values, np.float16).tobytes()
    chunk = data + crc32c(data)
    path = storage.local_path(SHARD)
    path.write_bytes(chunk + path.read_bytes()[len(chunk) :])
    rewrite_entry(storage, 0, (0, len(chunk)))
    with pytest.raises(
        DamagedStoreError, match=f"row 0, split 0: the chunk holds {2 * num_values}"
    ):
        open_array(storage).read_rows([0])[0]


def test_a_chunk_that_does_not_decompress_is_an_error(tmp_path):
    storage = LocalStorage(tmp_path)
    write(storage, MASK.schema("mask", (8, 8)), np.ones((1, 8, 8), np.uint8))
    junk = b"no zstd"
    index = np.array([[0, len(junk) + CRC_BYTES]], dtype="<u8").tobytes()
    data = junk + crc32c(junk) + index + crc32c(index)
    storage.local_path("g/mask/c/0/0/0").write_bytes(data)
    with pytest.raises(DamagedStoreError, match=r"g/mask/c/0/0/0: row 0, split 0: Zstd"):
        open_array(storage, "mask", MASK, num_rows=1).read_rows([0])[0]


def test_a_shard_cut_while_it_is_read_is_an_error(storage, rows):
    array = open_array(storage)
    np.testing.assert_array_equal(array.read_rows([0])[0], rows[0])
    storage.local_path(SHARD).write_bytes(b"")
    with pytest.raises(DamagedStoreError, match="CRC-32C differs"):
        array.read_rows([0])[0]


def test_more_shards_are_read_than_files_may_be_open(tmp_path):
    storage = LocalStorage(tmp_path)
    rows = np.arange(200 * 384, dtype=np.float16).reshape(200, 2, 3, 8, 8)
    write(storage, KIND.schema("block06", rows.shape[1:]), rows)
    array = open_array(storage, num_rows=200)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 20, hard))
    try:
        for row in range(200):  # one a shard
            array.read_rows([row])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_open_array_takes_no_more_memory_than_it_is_charged_for(storage):
    metadata = storage.read("g/block06/zarr.json")
    kept, indexes = LruCache(2**30, attrgetter("num_bytes")), keep_indexes()
    num = 2000

    def open_one(number):
        folder = "g/" + "x" * 100 + f"{number}/block06"
        array = ShardedArray(storage, folder, KIND, num_rows=6, metadata=metadata)
        array.indexes = indexes
        array._index = ShardIndex(number, 100, None)
        return array

    open_one(0)
    tracemalloc.start()
    for number in range(1000, 1000 + num):
        kept.get_or_make((number, "block06"), partial(open_one, number))
    taken = tracemalloc.get_traced_memory()[0] / num
    tracemalloc.stop()
    assert taken <= kept.cost / num <= 1.6 * taken, taken
