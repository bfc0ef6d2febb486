"""Zarr v3 arrays written as a stream of chunks, a sharded file at a time.

Data flow: rows arrive in order -> their inner chunks are appended to the open shard file, each
with its CRC-32C -> a full shard ends with its index -> ``close`` writes the array's ``zarr.json``.
A writer holds one chunk and one index in memory, whatever the array's length, and plain
zarr-python reads the result (https://zarr-specs.readthedocs.io/en/latest/v3/, sharding codec 1.0).
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import zstd

from pipeline.base.failpoints import pass_step
from pipeline.storage.interface import NewFile, Storage

SHARD_BYTES = 128 * 2**20  # what a shard is filled to: one large read, one file of many
MAX_SHARD_ROWS = 4096
INDEX_ENTRY_BYTES = 16  # offset and length, uint64 little-endian
CRC_BYTES = 4
MISSING = 2**64 - 1  # offset and length of a chunk that a shard does not hold
ZSTD_LEVEL = 3

# What plain Zarr readers show where a chunk is missing: a value that cannot be data.
_FILL_VALUES = {"float16": "NaN", "float32": "NaN", "int8": -128, "int16": -1, "uint8": 255}


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file of an attempt as it was written: path in the store, size, SHA-256 in hex."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ArraySchema:
    """What an array holds: a row's shape, its dtype, its names, how a row is cut and stored.

    ``row_shape`` leaves out the first dimension, the rows. ``split_rows`` cuts a row along its
    first axis into chunks of one entry (the draws of a feature).
    """

    name: str
    row_shape: tuple[int, ...]
    dtype: str
    dimensions: tuple[str, ...]
    split_rows: bool = False
    compressed: bool = False

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """An inner chunk's shape, rows first."""
        return (1, 1, *self.row_shape[1:]) if self.split_rows else (1, *self.row_shape)

    @property
    def chunk_values_shape(self) -> tuple[int, ...]:
        """An inner chunk's shape without the axes of length one that place it."""
        return self.row_shape[1:] if self.split_rows else self.row_shape

    @property
    def chunks_per_row(self) -> int:
        """Inner chunks a row."""
        return self.row_shape[0] if self.split_rows else 1

    @property
    def row_bytes(self) -> int:
        """Bytes a row before compression."""
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize

    @property
    def max_shard_rows(self) -> int:
        """Rows that fill a shard."""
        return min(max(SHARD_BYTES // self.row_bytes, 1), MAX_SHARD_ROWS)

    def shard_key(self, number: int) -> str:
        """Return the path of shard ``number`` below the array's folder."""
        return f"c/{number}" + "/0" * len(self.row_shape)

    def metadata(self, num_rows: int, shard_rows: int) -> dict[str, Any]:
        """Return the array's ``zarr.json``."""
        zstd_codec = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
        compression = [zstd_codec] if self.compressed else []
        sharding = {
            "chunk_shape": list(self.chunk_shape),
            "codecs": [_bytes_codec(self.dtype), *compression, {"name": "crc32c"}],
            "index_codecs": [_bytes_codec("uint64"), {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [num_rows, *self.row_shape],
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [shard_rows, *self.row_shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": _FILL_VALUES[self.dtype],
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
            "dimension_names": list(self.dimensions),
            "storage_transformers": [],
        }


def _bytes_codec(dtype: str) -> dict[str, Any]:
    endian = {"configuration": {"endian": "little"}} if np.dtype(dtype).itemsize > 1 else {}
    return {"name": "bytes", **endian}


def crc32c(data: bytes | memoryview) -> bytes:
    """Return the CRC-32C of ``data`` as four little-endian bytes (RFC 3720, appendix B.4)."""
    return int(google_crc32c.value(bytes(data))).to_bytes(CRC_BYTES, "little")


class ArrayWriter:
    """Appends rows to one sharded array. Close it once, after the last row."""

    def __init__(self, storage: Storage, group: str, schema: ArraySchema) -> None:
        self.schema = schema
        self._storage = storage
        self._folder = f"{group}/{schema.name}"
        self._num_chunks = 0
        self._shard: NewFile | None = None
        self._index: list[tuple[int, int]] = []
        self._written: list[WrittenFile] = []

    @property
    def num_rows(self) -> int:
        """Whole rows written so far."""
        return self._num_chunks // self.schema.chunks_per_row

    def append_rows(self, rows: np.ndarray) -> None:
        """Append rows (n, *row_shape); raises as ``append_chunks``."""
        if rows.shape[1:] != self.schema.row_shape:
            raise ValueError(
                f"{self._folder}: expected rows of {self.schema.row_shape}, got {rows.shape[1:]}"
            )
        self.append_chunks(rows.reshape(-1, *self.schema.chunk_values_shape))

    def append_chunks(self, chunks: np.ndarray) -> None:
        """Append chunks (n, *chunk_values_shape) in order; ValueError for another shape, dtype."""
        expected = self.schema.chunk_values_shape
        if chunks.shape[1:] != expected or chunks.dtype != np.dtype(self.schema.dtype):
            raise ValueError(
                f"{self._folder}: expected chunks of {expected} {self.schema.dtype}, "
                f"got {chunks.shape[1:]} {chunks.dtype}"
            )
        for chunk in chunks:
            self._append_chunk(chunk)

    def _append_chunk(self, chunk: np.ndarray) -> None:
        if self._shard is None:
            path = self._shard_path(self._num_chunks)
            self._shard = self._storage.open_write(path)
            pass_step("shard.opened", path)
        data = chunk.tobytes()
        if self.schema.compressed:
            data = zstd.compress(data, ZSTD_LEVEL)
        self._index.append((self._shard.num_bytes, len(data) + CRC_BYTES))
        self._shard.write(data)
        self._shard.write(crc32c(data))
        self._num_chunks += 1
        if len(self._index) == self._shard_chunks:
            self._close_shard(len(self._index))

    @property
    def _shard_chunks(self) -> int:
        return self.schema.max_shard_rows * self.schema.chunks_per_row

    def _shard_path(self, chunk: int) -> str:
        return f"{self._folder}/{self.schema.shard_key(chunk // self._shard_chunks)}"

    def _close_shard(self, num_entries: int) -> None:
        assert self._shard is not None
        index = np.full((num_entries, 2), MISSING, dtype="<u8")
        index[: len(self._index)] = self._index
        encoded = index.tobytes()
        self._shard.write(encoded)
        self._shard.write(crc32c(encoded))
        self._shard.close()
        path = self._shard_path(self._num_chunks - 1)
        pass_step("shard.closed", path)
        self._written.append(WrittenFile(path, self._shard.num_bytes, self._shard.sha256))
        self._shard, self._index = None, []

    def close(self) -> list[WrittenFile]:
        """End the last shard, write ``zarr.json`` and return every file written."""
        if self._num_chunks % self.schema.chunks_per_row:
            raise ValueError(f"{self._folder}: ended inside a row, after chunk {self._num_chunks}")
        full = self.schema.max_shard_rows
        shard_rows = full if self.num_rows > full else max(self.num_rows, 1)
        if self._shard is not None:
            self._close_shard(shard_rows * self.schema.chunks_per_row)
        metadata = self.schema.metadata(self.num_rows, shard_rows)
        self._written.append(_write_metadata(self._storage, self._folder, metadata))
        return self._written

    def abandon(self) -> None:
        """Let go of the open file; what was written stays an orphan for ``gc``."""
        if self._shard is not None:
            self._shard.abandon()
            self._shard = None


def write_group(storage: Storage, group: str) -> WrittenFile:
    """Write a Zarr group's ``zarr.json``."""
    return _write_metadata(
        storage, group, {"zarr_format": 3, "node_type": "group", "attributes": {}}
    )


def _write_metadata(storage: Storage, folder: str, data: dict[str, Any]) -> WrittenFile:
    return write_bytes(storage, f"{folder}/zarr.json", json.dumps(data, indent=2).encode() + b"\n")


def write_bytes(storage: Storage, path: str, data: bytes) -> WrittenFile:
    """Write a new small file."""
    with storage.open_write(path) as file:
        file.write(data)
    return WrittenFile(path, file.num_bytes, file.sha256)
