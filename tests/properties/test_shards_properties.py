"""For any array: what is written is read, by zarr-python too; damage never changes a value."""

import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import zarr
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage.local import LocalStorage
from pipeline.store import array_writer as shards
from pipeline.store.array_reader import ShardedArray
from pipeline.store.array_writer import ArrayWriter
from pipeline.store.commit import DamagedStoreError
from pipeline.store.layout import ArrayKind
from tests.support.examples import examples

DTYPES = ("float16", "float32", "int8", "int16", "uint8")


@st.composite
def arrays(draw, min_rows=0):
    """A kind, rows of it, and the bytes that fill a shard."""
    row_shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    dimensions = tuple("abcde"[: len(row_shape) + 1])
    split = draw(st.booleans()) and len(row_shape) > 1
    kind = ArrayKind(draw(st.sampled_from(DTYPES)), dimensions, split, draw(st.booleans()))
    num_rows = draw(st.integers(min_rows, 7))
    schema = kind.schema("x", row_shape)
    data = np.random.default_rng(draw(st.integers(0, 2**32))).bytes(num_rows * schema.row_bytes)
    rows = np.frombuffer(data, kind.dtype).reshape(num_rows, *row_shape)  # NaNs and infinities too
    return kind, rows, draw(st.integers(1, 4)) * schema.row_bytes


def write(storage, kind, rows):
    writer = ArrayWriter(storage, "g", kind.schema("x", rows.shape[1:]))
    writer.append_rows(rows)
    return writer.close()


def read(storage, kind, num_rows):
    metadata = storage.read("g/x/zarr.json")
    array = ShardedArray(storage, "g/x", kind, num_rows=num_rows, metadata=metadata)
    return [array.read_rows([row])[0].tobytes() for row in range(num_rows)]


def read_or_none(storage, kind, rows):
    """The rows, or None where a shard is refused as damaged."""
    try:
        return read(storage, kind, len(rows))
    except DamagedStoreError:
        return None


@examples(60)
@given(arrays())
def test_any_array_is_read_as_written(array):
    kind, rows, shard_bytes = array
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(shards, "SHARD_BYTES", shard_bytes),
    ):
        storage = LocalStorage(Path(folder))
        write(storage, kind, rows)
        assert read(storage, kind, len(rows)) == [row.tobytes() for row in rows]
        plain = zarr.open_array(storage.root / "g/x", mode="r")
        assert plain.shape == rows.shape
        assert plain[:].tobytes() == rows.tobytes()


@examples(100)
@given(arrays(min_rows=1), st.data())
def test_damage_is_an_error_or_changes_no_value(array, data):
    kind, rows, shard_bytes = array
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(shards, "SHARD_BYTES", shard_bytes),
    ):
        storage = LocalStorage(Path(folder))
        written = [file for file in write(storage, kind, rows) if "/c/" in file.path]
        path = storage.local_path(data.draw(st.sampled_from(written)).path)
        whole = path.read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1), label="at")
        if data.draw(st.booleans(), label="cut"):
            path.write_bytes(whole[:at])
        else:
            flipped = bytes([whole[at] ^ data.draw(st.integers(1, 255), label="flip")])
            path.write_bytes(whole[:at] + flipped + whole[at + 1 :])
        assert read_or_none(storage, kind, rows) in (None, [row.tobytes() for row in rows])
