"""Reading single chunks of a committed array straight from its shard files.

Data flow: ``zarr.json`` is held to the layer's schema -> a shard file is mapped once and its index
checked -> a chunk is a slice of the map, its CRC-32C checked on every read. Anything missing or
altered raises; a fill value is never returned.
"""

import json
import mmap
from typing import Any

import numpy as np
from numcodecs import zstd

from pipeline.commit import DamagedStoreError
from pipeline.layout import ArrayKind
from pipeline.shards import CRC_BYTES, INDEX_ENTRY_BYTES, MISSING, ArraySchema, crc32c
from pipeline.storage import LocalStorage


class ShardedArray:
    """One array of one task's attempt."""

    def __init__(
        self, storage: LocalStorage, folder: str, kind: ArrayKind, *, num_rows: int
    ) -> None:
        self._storage = storage
        self._folder = folder
        self.num_rows = num_rows
        self.schema, self._shard_rows = self._read_metadata(kind)
        self._shards: dict[int, tuple[mmap.mmap, np.ndarray]] = {}

    def _read_metadata(self, kind: ArrayKind) -> tuple[ArraySchema, int]:
        where = f"{self._folder}/zarr.json"
        try:
            found: dict[str, Any] = json.loads(self._storage.read(where))
            row_shape = tuple(int(side) for side in found["shape"][1:])
            shard_rows = int(found["chunk_grid"]["configuration"]["chunk_shape"][0])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DamagedStoreError(f"{where}: cannot be read: {error!r}") from error
        schema = kind.schema(self._folder.rsplit("/", 1)[-1], row_shape)
        if len(row_shape) != len(kind.dimensions) - 1 or min(row_shape, default=0) < 1:
            raise DamagedStoreError(f"{where}: expected axes {kind.dimensions}, got {row_shape}")
        expected = schema.metadata(self.num_rows, shard_rows)
        wrong = [key for key in expected if found.get(key) != expected[key]]
        if wrong or set(found) != set(expected) or not 0 < shard_rows <= schema.max_shard_rows:
            raise DamagedStoreError(
                f"{where}: expected {_excerpt(expected, wrong)}, got {_excerpt(found, wrong)}"
            )
        return schema, shard_rows

    def _open_shard(self, number: int) -> tuple[mmap.mmap, np.ndarray]:
        path = f"{self._folder}/{self.schema.shard_key(number)}"
        num_entries = self._shard_rows * self.schema.chunks_per_row
        index_bytes = num_entries * INDEX_ENTRY_BYTES
        try:
            with self._storage.local_path(path).open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise DamagedStoreError(
                f"{path}: a committed shard cannot be opened: {error}"
            ) from error
        tail = data[-(index_bytes + CRC_BYTES) :]
        if len(tail) != index_bytes + CRC_BYTES or crc32c(tail[:-CRC_BYTES]) != tail[-CRC_BYTES:]:
            raise DamagedStoreError(f"{path}: the shard's index is damaged (CRC-32C differs)")
        index = np.frombuffer(tail[:-CRC_BYTES], dtype="<u8").reshape(num_entries, 2)
        return data, index

    def read_chunk(self, row: int, split: int = 0) -> np.ndarray:
        """Return one inner chunk, read-only: a row, or entry ``split`` of a row that is cut.

        Raises:
            IndexError: no such row or split.
            DamagedStoreError: the chunk is missing or damaged; names file, row and split.
        """
        if not (0 <= row < self.num_rows and 0 <= split < self.schema.chunks_per_row):
            raise IndexError(f"{self._folder}: no row {row}, split {split} in {self.num_rows} rows")
        number, row_in_shard = divmod(row, self._shard_rows)
        if number not in self._shards:
            self._shards[number] = self._open_shard(number)
        data, index = self._shards[number]
        offset, length = (
            int(value) for value in index[row_in_shard * self.schema.chunks_per_row + split]
        )
        end = offset + length
        if MISSING in (offset, length) or length < CRC_BYTES or end > len(data):
            raise self._damage(number, row, split, "the chunk is missing")
        encoded = data[offset : end - CRC_BYTES]
        if crc32c(encoded) != data[end - CRC_BYTES : end]:
            raise self._damage(number, row, split, "the chunk's CRC-32C differs")
        values = self._decode(encoded)
        if values.size != np.prod(self.schema.chunk_values_shape):
            raise self._damage(number, row, split, f"the chunk holds {values.size} values")
        return values.reshape(self.schema.chunk_values_shape)

    def read_row(self, row: int) -> np.ndarray:
        """Return one row (*row_shape); raises as ``read_chunk``."""
        if not self.schema.split_rows:
            return self.read_chunk(row)
        return np.stack([self.read_chunk(row, i) for i in range(self.schema.chunks_per_row)])

    def _decode(self, encoded: bytes) -> np.ndarray:
        if self.schema.compressed:
            encoded = zstd.decompress(encoded)
        return np.frombuffer(encoded, dtype=np.dtype(self.schema.dtype).newbyteorder("<"))

    def _damage(self, number: int, row: int, split: int, what: str) -> DamagedStoreError:
        path = f"{self._folder}/{self.schema.shard_key(number)}"
        return DamagedStoreError(f"{path}: row {row}, split {split}: {what}")


def _excerpt(metadata: dict[str, Any], keys: list[str]) -> str:
    text = json.dumps({key: metadata.get(key) for key in keys} if keys else sorted(metadata))
    return text if len(text) <= 300 else text[:297] + "..."
