"""Reading chunks of a committed array straight from its shard files.

Data flow: ``zarr.json`` must be what ``array_writer`` writes for the layer's schema -> a shard's
index is read once and checked -> the wanted chunks of a shard are ranged reads, adjacent ones
joined, straight into the caller's memory -> the CRC-32C of each is checked at every read. Anything
missing or altered raises; a fill value is never returned.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import zstd

from pipeline.storage.interface import Memory, Storage
from pipeline.store.array_writer import CRC_BYTES, INDEX_ENTRY_BYTES, MISSING, ArraySchema, crc32c
from pipeline.store.commit import DamagedStoreError
from pipeline.store.layout import ArrayKind
from pipeline.store.row_memory import RowMemory
from pipeline.store.shard_index import ShardIndex, ShardIndexes, keep_indexes

_MAX_ROW_BYTES = 2**32  # a row is one pair's or one view's
_OPEN_BYTES = 576  # an array, its folder's name, its shard's index, its place among those kept
_NUM_FORMS = 4096  # arrays' names of a store's layers, times row shapes, of which a layer has one


@dataclass(frozen=True, slots=True)
class _Form:
    """What arrays of one schema share, so that an open one is small."""

    schema: ArraySchema
    chunk_shape: tuple[int, ...]
    dtype: str
    chunk_bytes: int
    num_splits: int
    plain_bytes: int  # of a stored chunk; -1: it says itself
    shard_key: tuple[str, str]  # before and after a shard's number: formatting costs as a read does


@lru_cache(_NUM_FORMS)
def _find_form(schema: ArraySchema) -> _Form:
    chunk_bytes = schema.row_bytes // schema.chunks_per_row
    key = schema.shard_key(0)
    return _Form(
        schema=schema,
        chunk_shape=schema.chunk_values_shape,
        dtype=schema.dtype,
        chunk_bytes=chunk_bytes,
        num_splits=schema.chunks_per_row,
        plain_bytes=-1 if schema.compressed else chunk_bytes + CRC_BYTES,
        shard_key=(f"/{key[:2]}", key[3:]),
    )


class ShardedArray:
    """One array of one task's attempt. A reader keeps 700,000 of them."""

    __slots__ = (
        "_form",
        "_index",
        "_shard_rows",
        "_storage",
        "chunk_shape",
        "dtype",
        "folder",
        "indexes",
        "num_rows",
    )

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
        schema, self._shard_rows = self._parse_metadata(metadata, kind)
        self._form = _find_form(schema)
        self.chunk_shape, self.dtype = self._form.chunk_shape, self._form.dtype
        self._index: ShardIndex | None = None  # of the only shard, where it is two numbers
        self.indexes: ShardIndexes = keep_indexes()  # or one shared with the store's other arrays

    @property
    def schema(self) -> ArraySchema:
        """What the array holds."""
        return self._form.schema

    @property
    def num_bytes(self) -> int:
        """Memory that it takes where it is kept open, about, without what ``indexes`` keeps."""
        return _OPEN_BYTES

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
        if schema.row_bytes > _MAX_ROW_BYTES:
            raise DamagedStoreError(
                f"{where}: expected rows of at most {_MAX_ROW_BYTES} bytes, got {row_shape}"
            )
        possible_rows = min(max(shard_rows, 1), schema.max_shard_rows)
        expected = schema.metadata(self.num_rows, possible_rows)
        wrong = [key for key in expected if found.get(key) != expected[key]]
        if wrong or set(found) != set(expected):
            raise DamagedStoreError(
                f"{where}: expected {_excerpt(expected, wrong)}, got {_excerpt(found, wrong)}; "
                "only arrays that ldznet has written are read, in its codecs and chunks: encode "
                "the task anew (verify STORE --report FILE, then encode with --repair FILE)"
            )
        return schema, shard_rows

    def _read_index(self, path: str) -> tuple[np.ndarray, int]:
        num_entries = self._shard_rows * self.schema.chunks_per_row
        index_bytes = num_entries * INDEX_ENTRY_BYTES
        try:
            tail, size = self._storage.read_tail(path, index_bytes + CRC_BYTES)
        except FileNotFoundError as error:
            raise DamagedStoreError(f"{path}: a committed shard is missing") from error
        if len(tail) != index_bytes + CRC_BYTES or crc32c(tail[:-CRC_BYTES]) != tail[-CRC_BYTES:]:
            raise DamagedStoreError(f"{path}: the shard's index is damaged (CRC-32C differs)")
        index = np.frombuffer(tail[:-CRC_BYTES], dtype="<u8").reshape(num_entries, 2)
        return index, size - len(tail)

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

    def read_rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return rows (n, *row_shape) in the order asked for, read-only.

        A row may be asked for several times and is read once; adjacent rows are one ranged read.

        Raises:
            IndexError: no such row.
            DamagedStoreError: a chunk is missing or damaged; names file, row and split.
        """
        num_splits = self.schema.chunks_per_row
        wanted = np.repeat(np.asarray(rows, np.int64), num_splits).tolist()
        found = np.empty((len(wanted), *self.chunk_shape), self.dtype)
        splits = list(range(num_splits)) * len(rows)
        for read in self.plan_reads(wanted, splits, range(len(wanted)), RowMemory(found)):
            read()
        found.flags.writeable = False
        return found.reshape(len(rows), *self.schema.row_shape)

    def plan_reads(
        self,
        rows: Sequence[int],
        splits: Sequence[int] | None,  # of each row that is cut, None: all 0
        places: Sequence[int],
        memory: RowMemory,
    ) -> list[Callable[[], None]]:
        """Return calls, one a shard, that read chunks; threads may make them at once.

        Chunks may come in any order and several times. Each is read to its place, a row of the
        memory, C order.

        Raises:
            IndexError: no such row or split.
            DamagedStoreError (from the calls): a chunk is missing or damaged; names file, row and
                split. What the memory holds is then undefined.
        """
        splits = splits or [0] * len(rows)
        num_splits, shard_chunks = self._form.num_splits, self._form.num_splits * self._shard_rows
        if not (rows and min(rows) >= 0 and max(rows) < self.num_rows) or not (
            min(splits) >= 0 and max(splits) < num_splits
        ):
            for row, split in zip(rows, splits, strict=True):
                if not (0 <= row < self.num_rows and 0 <= split < num_splits):
                    where = f"row {row}, split {split} in {self.num_rows} rows"
                    raise IndexError(f"{self.folder}: no {where}")
        shards: dict[int, list[tuple[int, int]]] = {}
        for row, split, place in zip(rows, splits, places, strict=True):
            number, chunk = divmod(row * num_splits + split, shard_chunks)
            if number in shards:
                shards[number].append((chunk, place))
            else:
                shards[number] = [(chunk, place)]
        return [
            partial(self._read_shard, number, wanted, memory) for number, wanted in shards.items()
        ]

    def _find_index(self, path: str) -> ShardIndex:
        """Return a shard's index, read when first asked for.

        The two numbers of an only shard, as most have, are kept with the array: a place of their
        own among the indexes, by the shard's path, would cost five times as much.
        """
        if self._index is not None:
            return self._index
        index = self.indexes.get_or_make(path, lambda: ShardIndex.parse(*self._read_index(path)))
        if index.table is None and self.num_shards == 1:
            self._index = index
            self.indexes.remove(path)
        return index

    def _read_shard(self, number: int, wanted: list[tuple[int, int]], memory: RowMemory) -> None:
        """Read chunks of one shard, by their numbers in it, each to a row of the memory."""
        before, after = self._form.shard_key
        path = f"{self.folder}{before}{number}{after}"
        index, plain_bytes = self._find_index(path), self._form.plain_bytes
        parts: list[tuple[int, list[Memory]]] = []
        read: list[tuple[int, int, Memory, bytearray]] = []  # chunk, place, its bytes, its CRC
        again: list[tuple[int, int]] = []  # places to copy to, and from
        end, last = -1, (-1, -1)
        for chunk, place in sorted(wanted):
            if chunk == last[0]:
                again.append((place, last[1]))
                continue
            last = chunk, place
            offset, length = index.locate(chunk)
            if length == 0:
                raise self._damage(number, chunk, "the chunk is missing")
            plain = length == plain_bytes
            data: Memory = memory.row(place) if plain else bytearray(length - CRC_BYTES)
            crc = bytearray(CRC_BYTES)
            if offset == end:
                parts[-1][1].extend((data, crc))
            else:
                parts.append((offset, [data, crc]))
            read.append((chunk, place, data, crc))
            end = offset + length
        try:
            whole = self._storage.read_into(path, parts)
        except FileNotFoundError as error:
            raise DamagedStoreError(f"{path}: a committed shard is missing") from error
        for chunk, place, data, crc in read:
            plain = type(data) is memoryview
            found = memory.checksum(place) if plain else google_crc32c.value(bytes(data))
            if not whole or found != int.from_bytes(crc, "little"):
                raise self._damage(number, chunk, "the chunk's CRC-32C differs")
            if not plain:
                memory.row(place)[:] = self._decode(data, number, chunk)
        for place, source in again:
            memory.row(place)[:] = memory.row(source)

    def _decode(self, encoded: Memory, number: int, chunk: int) -> Memory | bytes:
        try:
            data = zstd.decompress(encoded) if self.schema.compressed else encoded
        except RuntimeError as error:
            raise self._damage(number, chunk, str(error)) from error
        if len(data) != self._form.chunk_bytes:
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
