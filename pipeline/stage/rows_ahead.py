"""Rows of a stored array, read some MiB ahead in the order of need, each about once.

An object store answers a small read as slowly as one of some MiB, and a bucket takes 5,500 reads a
second in all: a read for each UNet batch would be 6,000 a task.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from pipeline.base.lru_cache import LruCache
from pipeline.store.array_reader import ShardedArray

AHEAD_BYTES = 8 * 2**20
"""Of one read: 70 prompts or 500 views at SD 1.4's size."""
KEPT_BYTES = 256 * 2**20
"""Of rows that may be needed again: 2,200 prompts at SD 1.4's 118 KB each."""


class RowsAhead:
    """Reads an array's rows for one reader, which asks for them in about the order of ``order``.

    A row that is asked for again is kept, unless ``kept_bytes`` of others were used since.
    """

    def __init__(
        self, array: ShardedArray, order: Iterable[int], *, kept_bytes: int = KEPT_BYTES
    ) -> None:
        self._array = array
        self._order = iter(order)
        self._num_ahead = max(1, min(AHEAD_BYTES, kept_bytes) // array.schema.row_bytes)
        self._kept: LruCache[int, np.ndarray] = LruCache(kept_bytes, cost=lambda row: row.nbytes)

    def __call__(self, rows: Sequence[int]) -> np.ndarray:
        """Return rows (n, *row_shape), as ``ShardedArray.read_rows`` does and with its errors."""
        kept = {row: self._kept.get(row) for row in rows}
        found = {row: values for row, values in kept.items() if values is not None}
        if missing := [row for row in kept if row not in found]:
            found |= self._read(missing)
        return np.stack([found[row] for row in rows])

    def _read(self, missing: Sequence[int]) -> dict[int, np.ndarray]:
        """Read rows together with those that are needed next, and keep all of them."""
        wanted = dict.fromkeys(missing)
        while len(wanted) < self._num_ahead and (row := next(self._order, None)) is not None:
            if self._kept.get(row) is None:
                wanted[row] = None
        found = {
            row: values.copy()  # a view would keep all that was read with it
            for row, values in zip(wanted, self._array.read_rows(list(wanted)), strict=True)
        }
        for row, values in found.items():
            self._kept.put(row, values)
        return found
