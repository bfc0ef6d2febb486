"""Where the chunks of a shard lie, and a bounded store of what was read of that.

A shard as its writer leaves it without compression is chunks of one size, one after another. Two
numbers then say what its index says. Compressed chunks that lie so are 4 bytes each, any others 16.
"""

from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from pipeline.base.lru_cache import LruCache
from pipeline.store.array_writer import CRC_BYTES, MISSING

INDEXES_BYTES = 320 * 2**20  # kept: of 130,000 tasks' masks, 500 each; or a million regular ones
_OBJECT_BYTES = 320  # a regular index and its place in the store, about
_ARRAY_BYTES = 128  # of NumPy's beside the values
_MAX_NARROW = 2**32


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Places of a shard's chunks: ``num_regular`` of ``chunk_bytes`` from byte 0 on, or a table.

    ``chunk_bytes`` includes the CRC-32C. ``table`` (chunks + 1,) uint32 has the ends of chunks that
    lie one after another, 0 first; or (entries, 2) int64 offset and length of each, length 0 where
    the chunk is not there or its place is not before the index.
    """

    num_regular: int
    chunk_bytes: int
    table: np.ndarray | None

    @classmethod
    def parse(cls, entries: np.ndarray, chunks_end: int) -> "ShardIndex":
        """Take apart a sharding index (n, 2) uint64 of chunks that lie before ``chunks_end``."""
        end = np.uint64(chunks_end)
        offsets, lengths = entries.T
        there = (lengths >= CRC_BYTES) & (lengths <= end)
        there &= offsets <= end - np.where(there, lengths, np.uint64(0))
        num, size = int(there.sum()), int(lengths[0])
        places = np.arange(num, dtype=np.uint64) * np.uint64(size if num else 0)
        if there[:num].all() and (entries[num:] == MISSING).all():
            if (lengths[:num] == size).all() and (offsets[:num] == places).all():
                return cls(num, size, None)
            ends = np.concatenate([[np.uint64(0)], np.cumsum(lengths[:num])])
            if chunks_end < _MAX_NARROW and (offsets[:num] == ends[:-1]).all():
                return cls(0, 0, ends.astype(np.uint32))
        return cls(0, 0, np.where(there[:, None], entries, np.uint64(0)).astype(np.int64))

    def locate(self, chunk: int) -> tuple[int, int]:
        """Return offset and length of a chunk by its number in the shard; length 0: not there."""
        if self.table is None:
            return chunk * self.chunk_bytes, self.chunk_bytes if chunk < self.num_regular else 0
        if self.table.ndim == 1:
            offset, end = (
                self.table[chunk : chunk + 2].tolist() if chunk + 1 < len(self.table) else (0, 0)
            )
            return offset, end - offset
        offset, length = self.table[chunk].tolist()
        return offset, length

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        return _OBJECT_BYTES + (0 if self.table is None else _ARRAY_BYTES + self.table.nbytes)


ShardIndexes = LruCache[str, ShardIndex]  # by the shard's path


def keep_indexes(max_bytes: int = INDEXES_BYTES) -> ShardIndexes:
    """Return an empty memory of shard indexes, which arrays of one store may share."""
    return LruCache(max_bytes, attrgetter("num_bytes"))
