"""Reading chunks of a committed array straight from its shard files.

Data flow: ``zarr.json`` is held to the layer's schema -> a shard's index is read once and checked
-> the chunks wanted of a shard are ranged reads, adjacent ones joined, straight into the caller's
memory -> the CRC-32C of each is checked every time. Anything missing or altered raises; a fill
value is never returned.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import zstd

from pipeline.commit import DamagedStoreError
from pipeline.layout import ArrayKind
from pipeline.shard_index import ShardIndex, ShardIndexes, keep_indexes
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
        self.folder = folder
        self.num_rows = num_rows
        self.schema, self._shard_rows = self._parse_metadata(metadata, kind)
        self.chunk_bytes = self.schema.row_bytes // self.schema.chunks_per_row
        self.indexes: ShardIndexes = keep_indexes()  # or one shared with the store's other arrays

    def _parse_metadata(self, metadata: bytes, kind: ArrayKind) -> tuple[ArraySchema, int]:
        where = f"{self.folder}/zarr.json"
        try:
            found: dict[str, Any] = json.loads(metadata)
            row_shape = tuple(int(side) for side in found["shape"][1:])
            shard_rows = int(found["chunk_grid"]["configuration"]["chunk_shape"][0])
        except (ValueError, KeyError, TypeError, IndexError, ArithmeticError) as error:
            raise DamagedStoreError(f"{where}: cannot be read: {error!r}") from error
        schema = kind.schema(self.folder.rsplit("/", 1)[-1], row_shape)
        if len(row_shape) != len(kind.dimensions) - 1 or min(row_shape, default=0) < 1:
            raise DamagedStoreError(f"{where}: expected axes {kind.dimensions}, got {row_shape}")
        expected = schema.metadata(self.num_rows, shard_rows)
        wrong = [key for key in expected if found.get(key) != expected[key]]
        if wrong or set(found) != set(expected) or not 0 < shard_rows <= schema.max_shard_rows:
            raise DamagedStoreError(
                f"{where}: expected {_excerpt(expected, wrong)}, got {_excerpt(found, wrong)}"
            )
        return schema, shard_rows

    def _read_index(self, path: str) -> tuple[np.ndarray, int]:
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
            path = f"{self.folder}/{self.schema.shard_key(number)}"
            index, chunks_end = self._read_index(path)
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
        return self._read_chunks([self.chunk_number(row, split)])[0]

    def read_row(self, row: int) -> np.ndarray:
        """Return one row (*row_shape), read-only; raises as ``read_chunk``."""
        return self.read_rows([row])[0]

    def read_rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return rows (n, *row_shape) in the order asked for, read-only.

        A row may be asked for several times and is read once; adjacent rows are one ranged read.

        Raises:
            IndexError: no such row.
            DamagedStoreError: a chunk is missing or damaged; names file, row and split.
        """
        num_splits = self.schema.chunks_per_row
        firsts = self.chunk_numbers(np.asarray(rows, np.int64).tolist())
        found = self._read_chunks(
            [first + split for first in firsts for split in range(num_splits)]
        )
        return found.reshape(len(firsts), *self.schema.row_shape)

    def chunk_number(self, row: int, split: int = 0) -> int:
        """Return the number of a chunk in the array; IndexError where there is none."""
        if not (0 <= row < self.num_rows and 0 <= split < self.schema.chunks_per_row):
            raise IndexError(f"{self.folder}: no row {row}, split {split} in {self.num_rows} rows")
        return row * self.schema.chunks_per_row + split

    def chunk_numbers(self, rows: Sequence[int], splits: Sequence[int] | None = None) -> list[int]:
        """Return the numbers of some chunks, of split 0 by default; raises as ``chunk_number``."""
        num_splits = self.schema.chunks_per_row
        if splits is None:
            splits = [0] * len(rows)
        if rows:
            for row, split in ((min(rows), min(splits)), (max(rows), max(splits))):
                self.chunk_number(row, split)
        return [row * num_splits + split for row, split in zip(rows, splits, strict=True)]

    def _read_chunks(self, chunks: Sequence[int]) -> np.ndarray:
        found = np.empty((len(chunks), *self.schema.chunk_values_shape), self.schema.dtype)
        self.read_into(chunks, list(found.view(np.uint8).reshape(len(chunks), self.chunk_bytes)))
        found.flags.writeable = False
        return found

    def read_into(self, chunks: Sequence[int], memories: Sequence[np.ndarray]) -> None:
        """Read chunks by their numbers, in any order and also several times, to a memory each.

        A memory is uint8 of ``chunk_bytes``, C order.

        Raises:
            DamagedStoreError: a chunk is missing or damaged; names file, row and split. What the
                memories hold is then undefined.
        """
        for read in self.plan_reads(chunks, memories):
            read()

    def plan_reads(
        self, chunks: Sequence[int], memories: Sequence[np.ndarray]
    ) -> list[Callable[[], None]]:
        """Return what ``read_into`` does as one call a shard, which threads may make at once."""
        shard_chunks = self._shard_rows * self.schema.chunks_per_row
        shards: dict[int, dict[int, list[np.ndarray]]] = {}
        for chunk, memory in zip(chunks, memories, strict=True):
            number, within = divmod(chunk, shard_chunks)
            shards.setdefault(number, {}).setdefault(within, []).append(memory)
        return [partial(self._read_shard, number, wanted) for number, wanted in shards.items()]

    def _read_shard(self, number: int, wanted: dict[int, list[np.ndarray]]) -> None:
        """Read chunks of one shard, by their numbers in it, to one or more memories each."""
        path = f"{self.folder}/{self.schema.shard_key(number)}"
        index = self.indexes.find(path, lambda: ShardIndex.parse(*self._read_index(path)))
        plain_bytes = -1 if self.schema.compressed else self.chunk_bytes + CRC_BYTES
        parts: list[tuple[int, list[np.ndarray]]] = []
        read: list[tuple[int, np.ndarray, np.ndarray]] = []  # chunk, its bytes, its CRC
        end = -1
        for chunk in sorted(wanted):
            offset, length = index.find(chunk)
            if length == 0:
                raise self._damage(number, chunk, "the chunk is missing")
            plain = length == plain_bytes
            data = wanted[chunk][0] if plain else np.empty(length - CRC_BYTES, np.uint8)
            crc = np.empty(CRC_BYTES, np.uint8)
            if offset != end:
                parts.append((offset, []))
            parts[-1][1].extend((data, crc))
            read.append((chunk, data, crc))
            end = offset + length
        try:
            whole = self._storage.read_into(path, parts)
        except FileNotFoundError as error:
            raise DamagedStoreError(f"{path}: a committed shard is missing") from error
        for chunk, data, crc in read:
            if not whole or google_crc32c.value(data) != int.from_bytes(crc, "little"):
                raise self._damage(number, chunk, "the chunk's CRC-32C differs")
            memories = wanted[chunk]
            if data is memories[0]:
                memories = memories[1:]
            if memories:
                values = self._decode(data, number, chunk)
                for memory in memories:
                    memory[:] = values

    def _decode(self, encoded: np.ndarray, number: int, chunk: int) -> np.ndarray:
        data = encoded
        if self.schema.compressed:
            try:
                data = np.frombuffer(zstd.decompress(encoded), np.uint8)
            except RuntimeError as error:
                raise self._damage(number, chunk, str(error)) from error
        if len(data) != self.chunk_bytes:
            raise self._damage(number, chunk, f"the chunk holds {len(data)} bytes")
        return data

    def _damage(self, number: int, chunk: int, what: str) -> DamagedStoreError:
        """Return the error of a chunk by its number in the shard."""
        path = f"{self.folder}/{self.schema.shard_key(number)}"
        row, split = divmod(chunk, self.schema.chunks_per_row)
        row += number * self._shard_rows
        return DamagedStoreError(f"{path}: row {row}, split {split}: {what}")


def _excerpt(metadata: dict[str, Any], keys: list[str]) -> str:
    text = json.dumps({key: metadata.get(key) for key in keys} if keys else sorted(metadata))
    return text if len(text) <= 300 else text[:297] + "..."
