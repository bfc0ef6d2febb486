"""Reading single chunks of a committed array straight from its shard files.

Data flow: ``zarr.json`` is held to the layer's schema -> a shard's index is read once and checked
-> a chunk is one ranged read, its CRC-32C checked every time. Anything missing or altered raises;
a fill value is never returned.
"""

import json
import math
from typing import Any

import numpy as np
from numcodecs import zstd

from pipeline.commit import DamagedStoreError
from pipeline.layout import ArrayKind
from pipeline.shards import CRC_BYTES, INDEX_ENTRY_BYTES, MISSING, ArraySchema, crc32c
from pipeline.storage_interface import Storage


class ShardedArray:
    """One array of one task's attempt."""

    def __init__(
        self,
        storage: Storage,
        folder: str,
        kind: ArrayKind,
        *,
        num_rows: int,
        metadata: bytes,  # of its zarr.json, which the caller has checked
    ) -> None:
        self._storage = storage
        self._folder = folder
        self.num_rows = num_rows
        self.schema, self._shard_rows = self._parse_metadata(metadata, kind)
        self._indexes: dict[int, tuple[np.ndarray, int]] = {}

    def _parse_metadata(self, metadata: bytes, kind: ArrayKind) -> tuple[ArraySchema, int]:
        where = f"{self._folder}/zarr.json"
        try:
            found: dict[str, Any] = json.loads(metadata)
            row_shape = tuple(int(side) for side in found["shape"][1:])
            shard_rows = int(found["chunk_grid"]["configuration"]["chunk_shape"][0])
        except (ValueError, KeyError, TypeError, IndexError, ArithmeticError) as error:
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

    def _read_index(self, number: int) -> tuple[np.ndarray, int]:
        path = f"{self._folder}/{self.schema.shard_key(number)}"
        num_entries = self._shard_rows * self.schema.chunks_per_row
        index_bytes = num_entries * INDEX_ENTRY_BYTES
        try:
            start = self._storage.size(path) - index_bytes - CRC_BYTES
            tail = (
                self._storage.read_range(path, start, index_bytes + CRC_BYTES) if start > 0 else b""
            )
        except FileNotFoundError as error:
            raise DamagedStoreError(f"{path}: a committed shard is missing") from error
        if len(tail) != index_bytes + CRC_BYTES or crc32c(tail[:-CRC_BYTES]) != tail[-CRC_BYTES:]:
            raise DamagedStoreError(f"{path}: the shard's index is damaged (CRC-32C differs)")
        return np.frombuffer(tail[:-CRC_BYTES], dtype="<u8").reshape(num_entries, 2), start

    @property
    def num_shards(self) -> int:
        """Shard files that the array must have."""
        return -(-self.num_rows // self._shard_rows)

    def find_index_fault(self, number: int) -> str | None:
        """Return what is wrong with a shard's index, None where every chunk is in its place.

        The chunks of the rows there are must lie one after another from byte 0 to the index, as
        the writer leaves them; the places of rows past the last must be marked as missing.
        """
        try:
            index, chunks_end = self._read_index(number)
        except DamagedStoreError as error:
            return str(error)
        rows = min(self._shard_rows, self.num_rows - number * self._shard_rows)
        num_chunks = rows * self.schema.chunks_per_row
        there, beyond = index[:num_chunks], index[num_chunks:]
        if (there == MISSING).any():
            return f"{int((there == MISSING).any(axis=1).sum())} of {num_chunks} chunks are missing"
        if (beyond != MISSING).any():
            return f"holds chunks beyond its {rows} rows"
        starts = np.concatenate([[0], np.cumsum(there[:, 1], dtype=np.uint64)])
        if (there[:, 0] != starts[:-1]).any() or int(starts[-1]) != chunks_end:
            return f"its {num_chunks} chunks do not fill the {chunks_end} bytes before the index"
        return None

    def read_chunk(self, row: int, split: int = 0) -> np.ndarray:
        """Return one inner chunk, read-only: a row, or entry ``split`` of a row that is cut.

        Raises:
            IndexError: no such row or split.
            DamagedStoreError: the chunk is missing or damaged; names file, row and split.
        """
        if not (0 <= row < self.num_rows and 0 <= split < self.schema.chunks_per_row):
            raise IndexError(f"{self._folder}: no row {row}, split {split} in {self.num_rows} rows")
        number, row_in_shard = divmod(row, self._shard_rows)
        if number not in self._indexes:
            self._indexes[number] = self._read_index(number)
        index, chunks_end = self._indexes[number]
        entry = index[row_in_shard * self.schema.chunks_per_row + split]
        offset, length = int(entry[0]), int(entry[1])
        if MISSING in (offset, length) or length < CRC_BYTES or offset + length > chunks_end:
            raise self._damage(number, row, split, "the chunk is missing")
        path = f"{self._folder}/{self.schema.shard_key(number)}"
        try:
            stored = self._storage.read_range(path, offset, length)
        except FileNotFoundError as error:
            raise DamagedStoreError(f"{path}: a committed shard is missing") from error
        encoded, crc = stored[:-CRC_BYTES], stored[-CRC_BYTES:]
        if len(stored) != length or crc32c(encoded) != crc:
            raise self._damage(number, row, split, "the chunk's CRC-32C differs")
        return self._decode(encoded, number, row, split)

    def read_row(self, row: int) -> np.ndarray:
        """Return one row (*row_shape); raises as ``read_chunk``."""
        if not self.schema.split_rows:
            return self.read_chunk(row)
        return np.stack([self.read_chunk(row, i) for i in range(self.schema.chunks_per_row)])

    def _decode(self, encoded: bytes, number: int, row: int, split: int) -> np.ndarray:
        if self.schema.compressed:
            try:
                encoded = zstd.decompress(encoded)
            except RuntimeError as error:
                raise self._damage(number, row, split, str(error)) from error
        shape = self.schema.chunk_values_shape
        dtype = np.dtype(self.schema.dtype).newbyteorder("<")
        if len(encoded) != math.prod(shape) * dtype.itemsize:
            raise self._damage(number, row, split, f"the chunk holds {len(encoded)} bytes")
        return np.frombuffer(encoded, dtype=dtype).reshape(shape)

    def _damage(self, number: int, row: int, split: int, what: str) -> DamagedStoreError:
        path = f"{self._folder}/{self.schema.shard_key(number)}"
        return DamagedStoreError(f"{path}: row {row}, split {split}: {what}")


def _excerpt(metadata: dict[str, Any], keys: list[str]) -> str:
    text = json.dumps({key: metadata.get(key) for key in keys} if keys else sorted(metadata))
    return text if len(text) <= 300 else text[:297] + "..."
