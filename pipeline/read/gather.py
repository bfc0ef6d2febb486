"""Gathers rows of many tasks' arrays into one tensor for each array of a batch.

Data flow: (task, array, its rows, their places in the batch) -> the open array, of which the last
used are kept -> the array's tensor in the batch -> reads of rows straight to their places, by
shard -> all reads made at once by some threads.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from operator import attrgetter
from typing import Any

from torch import Tensor

from pipeline.base.forks import renew_in_child
from pipeline.base.lru_cache import LruCache
from pipeline.read.batch import BatchMemory
from pipeline.store.array_reader import ShardedArray
from pipeline.store.commit import DamagedStoreError
from pipeline.store.row_memory import RowMemory
from pipeline.store.shard_index import keep_indexes

ARRAYS_BYTES = 384 * 2**20  # of open ones kept: 700,000, those of 10^5 tasks


class RowGatherer:
    """The open arrays of a reader, the memory and the threads that it reads with.

    Threads may share it. Pickling takes along how arrays are opened, and none of the others; so
    does a fork.
    """

    def __init__(
        self,
        open_array: Callable[[int, str], ShardedArray],  # of a task's number and an array's name
        *,
        pinned: bool,
        num_threads: int,
    ) -> None:
        self._open_array = open_array
        self._num_threads = num_threads
        self._pinned = pinned
        self._arrays: LruCache[tuple[int, str], ShardedArray] = LruCache(
            ARRAYS_BYTES, attrgetter("num_bytes")
        )
        self._indexes = keep_indexes()
        self.memory = BatchMemory(pinned=pinned)
        renew_in_child(self)

    def renew(self) -> None:
        """Take another pool, which starts threads as needed."""
        self._pool = ThreadPoolExecutor(self._num_threads, "read")

    def __reduce__(self) -> tuple[Any, ...]:
        num_threads, pinned = self._num_threads, self._pinned
        return partial(RowGatherer, self._open_array, pinned=pinned, num_threads=num_threads), ()

    def array(self, task: int, name: str) -> ShardedArray:
        """Return a task's array, opened unless it is kept."""
        return self._arrays.get_or_make((task, name), lambda: self._open(task, name))

    def _open(self, task: int, name: str) -> ShardedArray:
        array = self._open_array(task, name)
        array.indexes = self._indexes
        return array

    def run(self, reads: Sequence[Callable[[], None]]) -> None:
        """Make all reads, some at once; of several errors one is raised, and no read goes on.

        Threads take the next read from one iterator: a future for each would cost half a chunk.
        """
        left = iter(reads)

        def make_reads() -> None:
            try:
                for read in left:
                    read()
            finally:
                deque(left, maxlen=0)  # after an error the others end too

        num = min(self._num_threads, len(reads)) - 1
        beside = [self._pool.submit(make_reads) for _ in range(num)]
        try:
            make_reads()
        finally:
            wait(beside)
        for future in beside:
            future.result()


class Gather:
    """One batch of ``num`` rows: a tensor (num, *chunk_values_shape) for each array's name."""

    def __init__(self, gatherer: RowGatherer, num: int) -> None:
        self._gatherer = gatherer
        self._num = num
        self._memories: dict[str, RowMemory] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._reads: list[Callable[[], None]] = []
        self.tensors: dict[str, Tensor] = {}

    def add(
        self,
        task: int,
        name: str,
        rows: Sequence[int],
        places: Sequence[int],
        splits: Sequence[int] | None = None,  # of each row that is cut into draws
    ) -> None:
        """Add the rows of a task's array, each with its place in the batch.

        Raises:
            IndexError: no such row or split.
            DamagedStoreError: the array is not as committed, or its rows have another shape than
                another task's.
        """
        array = self._gatherer.array(task, name)
        self._allocate(name, array.chunk_shape, array.dtype)
        if self._shapes[name] != array.chunk_shape:
            raise DamagedStoreError(
                f"{array.folder}: expected rows of {self._shapes[name]}, as another task has, "
                f"got {array.chunk_shape}"
            )
        self._reads += array.plan_reads(rows, splits, places, self._memories[name])

    def add_zeros(self, name: str, places: Sequence[int], *, like: str) -> None:
        """Set places of an array to zeros, in rows as of ``like``, which was added before."""
        tensor = self.tensors[like]
        self._allocate(name, tuple(tensor.shape[1:]), tensor.numpy().dtype.name)
        self.tensors[name].numpy()[list(places)] = 0

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        if name not in self.tensors:
            tensor = self._gatherer.memory.allocate((self._num, *shape), dtype)
            self.tensors[name], self._shapes[name] = tensor, shape
            self._memories[name] = RowMemory(tensor.numpy())

    def read(self) -> dict[str, Tensor]:
        """Read what was added and return the tensors by array name.

        Raises:
            DamagedStoreError: a chunk is missing or damaged; names file, row and split.
        """
        self._gatherer.run(self._reads)
        return self.tensors
