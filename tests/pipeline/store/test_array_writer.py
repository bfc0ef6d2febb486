"""Sharded arrays as they are written: read by zarr-python alone, exact in every byte."""

import hashlib
import json

import numpy as np
import pytest
import zarr

from pipeline.storage.local import LocalStorage
from pipeline.store import array_writer as shards
from pipeline.store.array_writer import ArraySchema, ArrayWriter, crc32c, write_group

PLAIN = ArraySchema("latent_mean", (4, 8, 8), "float16", ("view", "channel", "y", "x"))
SPLIT = ArraySchema("block06", (2, 3, 2, 2), "int8", ("pair", "draw", "c", "y", "x"), True)
MASK = ArraySchema("mask", (16, 16), "uint8", ("pair", "y", "x"), compressed=True)


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "store")


def make_rows(schema, num):
    values = np.arange(num * int(np.prod(schema.row_shape))) % 101
    return values.reshape(num, *schema.row_shape).astype(schema.dtype)


def write(storage, schema, rows, group="g.zarr"):
    writer = ArrayWriter(storage, group, schema)
    writer.append_rows(rows)
    return writer.close()


def test_crc32c_is_castagnolis():
    assert crc32c(b"123456789") == (0xE3069283).to_bytes(4, "little")  # RFC 3720's check value


@pytest.mark.parametrize("schema", [PLAIN, SPLIT, MASK], ids=lambda schema: schema.name)
@pytest.mark.parametrize("num", [0, 1, 3, 4, 9])
def test_zarr_python_reads_what_was_written(storage, monkeypatch, schema, num):
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 * schema.row_bytes)  # a shard: 4 rows
    rows = make_rows(schema, num)
    written = write(storage, schema, rows)
    written.append(write_group(storage, "g.zarr"))
    array = zarr.open_group(storage.root / "g.zarr", mode="r")[schema.name]
    assert array.metadata.dimension_names == schema.dimensions
    assert array.chunks == schema.chunk_shape
    assert array.dtype == np.dtype(schema.dtype)
    np.testing.assert_array_equal(array[:], rows)
    assert len(written) == -(-num // 4) + 2
    files = [path for path in storage.root.rglob("*") if path.is_file()]
    assert {str(path.relative_to(storage.root)) for path in files} == {w.path for w in written}
    for file in written:
        data = storage.read(file.path)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.num_bytes, file.sha256)


def test_rows_by_ones_and_chunks_make_the_same_bytes(storage):
    rows = make_rows(SPLIT, 3)
    at_once = write(storage, SPLIT, rows, "a.zarr")
    writer = ArrayWriter(storage, "b.zarr", SPLIT)
    writer.append_rows(rows[:1])
    writer.append_chunks(rows[1:].reshape(-1, 3, 2, 2)[:3])
    writer.append_chunks(rows[2][1:])
    assert writer.num_rows == 3
    assert [file.sha256 for file in writer.close()] == [file.sha256 for file in at_once]


def test_a_chunk_that_nobody_wrote_reads_as_no_data(storage):
    """zarr-python fills what is missing; the fill value cannot be taken for data."""
    write(storage, PLAIN, make_rows(PLAIN, 2))
    storage.local_path("g.zarr/latent_mean/c/0/0/0/0").unlink()
    assert np.isnan(zarr.open_array(storage.root / "g.zarr/latent_mean", mode="r")[:]).all()


def test_a_shard_is_filled_to_its_size_and_no_further(storage):
    assert ArraySchema("a", (1280, 12, 12), "float16", ()).max_shard_rows == 364
    assert ArraySchema("a", (3,), "int16", ()).max_shard_rows == shards.MAX_SHARD_ROWS
    assert ArraySchema("a", (2**20, 2**10), "float16", ()).max_shard_rows == 1
    assert ArraySchema("a", (2**40, 2**40), "float16", ()).row_bytes == 2**81


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((1, 8, 8, 4), np.float16), r"expected rows of \(4, 8, 8\), got \(8, 8, 4\)"),
        (np.zeros((4, 8, 8), np.float16), r"expected rows of \(4, 8, 8\), got \(8, 8\)"),
        (np.zeros((1, 4, 8, 8), np.float32), r"expected chunks of .* float16, got .* float32"),
        (np.zeros((1, 4, 8, 8), ">f2"), r"expected chunks of .* float16, got .* >f2"),
    ],
)
def test_rows_of_another_form_are_refused(storage, rows, message):
    writer = ArrayWriter(storage, "g.zarr", PLAIN)
    with pytest.raises(ValueError, match=message):
        writer.append_rows(rows)
    assert writer.num_rows == 0


def test_an_array_that_ends_inside_a_row_is_refused(storage):
    writer = ArrayWriter(storage, "g.zarr", SPLIT)
    writer.append_chunks(make_rows(SPLIT, 2).reshape(-1, 3, 2, 2)[:3])
    with pytest.raises(ValueError, match="ended inside a row, after chunk 3"):
        writer.close()
    writer.abandon()
    assert not storage.exists("g.zarr/block06/zarr.json")


def test_an_abandoned_array_closes_its_file(storage):
    writer = ArrayWriter(storage, "g.zarr", PLAIN)
    writer.append_rows(make_rows(PLAIN, 1))
    file = writer._shard._file
    writer.abandon()
    writer.abandon()
    assert file.closed


def test_a_writer_never_overwrites(storage):
    write(storage, PLAIN, make_rows(PLAIN, 1))
    with pytest.raises(FileExistsError):
        write(storage, PLAIN, make_rows(PLAIN, 1))


def test_metadata_are_plain_json(storage):
    written = [f for s in (PLAIN, SPLIT) for f in ArrayWriter(storage, "g.zarr", s).close()]
    assert [w.path for w in written] == ["g.zarr/latent_mean/zarr.json", "g.zarr/block06/zarr.json"]
    found = json.loads(storage.read("g.zarr/block06/zarr.json"))
    assert found == SPLIT.metadata(0, 1)
    assert found["codecs"][0]["configuration"]["chunk_shape"] == [1, 1, 3, 2, 2]
