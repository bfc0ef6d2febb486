"""The pairs of a snapshot's tasks, by number from 0, in task and row order.

Data flow: commit records -> pairs a task, with a choice the rows of each that are read -> a pair
number -> (task, row) -> that task's index, of which the last used are kept. What is kept for ever
is some 100 bytes a task, 4 a pair where not all are read, and 8 where one view of several is.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from operator import attrgetter
from typing import TypeVar

import numpy as np
import pyarrow as pa

from pipeline.commit import (
    Commit,
    DamagedStoreError,
    RecordName,
    read_commit,
    record_path,
    unseal_record,
)
from pipeline.pair_choice import PairChoice
from pipeline.recent import Recent
from pipeline.spec import LayerSpec, SpecError
from pipeline.store import Store
from pipeline.view_samples import ViewGroups, ViewSamples, check_numbers, group_views

COLUMNS = ("key", "view", "phrase", "latent_row", "text_row", "mask_area")
TABLE_BYTES = 512 * 2**20  # of indexes kept: those of some million pairs
_COMMITS = 1024  # kept, 30 KB each
_NUM_READERS = 32  # of records and indexes: latency is what they cost
_MAX_HANDED = 64
_AT_ONCE = 16384

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class TaskRows:
    """A task's index, and columns of it: texts, and int64 (pairs,)."""

    table: pa.Table
    key: pa.Array
    phrase: pa.Array
    latent_row: np.ndarray
    text_row: np.ndarray

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        return int(self.table.nbytes) + self.latent_row.nbytes * 2


@dataclass(frozen=True, slots=True)
class _Task:
    record: RecordName
    num_pairs: int
    pairs_sha256: str
    rows: np.ndarray | None  # of the index that are read; None: all


class PairIndex:
    """Finds pairs by number. Threads may share it."""

    def __init__(
        self,
        store: Store,
        layer: LayerSpec,
        records: Sequence[RecordName],
        choice: PairChoice,
        *,
        by_sample: bool = False,  # also group the views of a phrase
    ) -> None:
        self._store = store
        self._layer = layer.folder
        self._by_sample = by_sample
        self._choice = choice
        self._tables: Recent[int, TaskRows] = Recent(TABLE_BYTES, attrgetter("num_bytes"))
        self._commits: Recent[int, Commit] = Recent(_COMMITS)
        self._tasks: list[_Task] = []
        groups: list[ViewGroups] = []
        for some in _read_together(self._read_task, records):
            self._tasks += (task for task, _ in some)
            if by_sample:
                groups.append(ViewGroups.join(group for _, group in some if group is not None))
        self.starts = np.cumsum([0, *(task.num_pairs for task in self._tasks)])
        self.samples = ViewSamples(ViewGroups.join(groups), self.starts) if groups else None

    def _read_task(self, record: RecordName) -> tuple[_Task, ViewGroups | None]:
        num, pairs_sha256 = _read_counts(self._store, self._layer, record)
        rows, groups = None, None
        if self._by_sample or not self._choice.takes_all:
            index = self._store.read_index(read_commit(self._store.storage, self._layer, record))
            rows = self._choice.select(index)
            if len(rows) == num:
                rows = None
            if self._by_sample:
                groups = group_views(index, rows)
        return _Task(record, num if rows is None else len(rows), pairs_sha256, rows), groups

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def tasks(self) -> tuple[str, ...]:
        """The ids of the tasks, also of those without a pair that is read."""
        return tuple(task.record.task for task in self._tasks)

    def pairs_sha256(self, task: int) -> str:
        """Return what a features commit over this task must name."""
        return self._tasks[task].pairs_sha256

    def commit(self, task: int) -> Commit:
        """Return a task's commit."""
        return self._commits.find(
            task, lambda: read_commit(self._store.storage, self._layer, self._tasks[task].record)
        )

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each pair's task and its row in the task's index, int64.

        Raises:
            IndexError: no such pair.
        """
        check_numbers(numbers, len(self), "pair")
        tasks = np.searchsorted(self.starts, numbers, side="right") - 1
        rows = numbers - self.starts[tasks]
        for task in np.unique(tasks):
            chosen = self._tasks[task].rows
            if chosen is not None:
                here = tasks == task
                rows[here] = chosen[rows[here]]
        return tasks, rows

    def read_rows(self, task: int) -> TaskRows:
        """Return a task's index.

        Raises:
            DamagedStoreError: it is missing or altered, or names a row that the arrays lack.
        """
        return self._tables.find(task, lambda: self._read_rows(task))

    def _read_rows(self, task: int) -> TaskRows:
        commit = self.commit(task)
        table = self._store.read_index(commit).select(COLUMNS).combine_chunks()
        latent_row, text_row = (table[name].to_numpy() for name in ("latent_row", "text_row"))
        for column, rows in ((latent_row, "views"), (text_row, "prompts")):
            if len(column) and not (column.min() >= 0 and column.max() < commit.rows[rows]):
                raise DamagedStoreError(
                    f"{commit.data_folder}: its index names a row outside its "
                    f"{commit.rows[rows]} {rows}"
                )
        key, phrase = (table[name].combine_chunks() for name in ("key", "phrase"))
        return TaskRows(table, key, phrase, latent_row, text_row)

    def read_table(self) -> pa.Table:
        """Return the index of every pair that is read, which must fit in memory."""
        tables = []
        for number, task in enumerate(self._tasks):
            table = self.read_rows(number).table
            tables.append(table if task.rows is None else table.take(pa.array(task.rows)))
        return pa.concat_tables(tables)


class FeaturesOf:
    """The features commits over the tasks of a ``PairIndex``, by the same numbers."""

    def __init__(
        self, store: Store, layer: LayerSpec, records: Sequence[RecordName], pairs: PairIndex
    ) -> None:
        self.layer = layer
        self._store = store
        self._commits: Recent[int, Commit] = Recent(_COMMITS)
        over = {record.task: record for record in records}
        missing = next((task for task in pairs.tasks if task not in over), None)
        if missing is not None:
            raise SpecError(
                f"{layer.folder}: task {missing} has latents but no features; "
                "run encode again with the same spec to add them"
            )
        self._records = [over[task] for task in pairs.tasks]
        for _ in _read_together(partial(self._check, pairs), range(len(self._records))):
            pass

    def _check(self, pairs: PairIndex, task: int) -> None:
        _, pairs_sha256 = _read_counts(self._store, self.layer.folder, self._records[task])
        if pairs_sha256 != pairs.pairs_sha256(task):
            raise DamagedStoreError(
                f"{self.commit(task).name}: its rows are not those of {pairs.commit(task).name}"
            )

    def commit(self, task: int) -> Commit:
        """Return the features commit over a task."""
        return self._commits.find(
            task, lambda: read_commit(self._store.storage, self.layer.folder, self._records[task])
        )


def _read_counts(store: Store, layer: str, record: RecordName) -> tuple[int, str]:
    """Return a record's number of pairs and their digest, its seal checked.

    A fifth of ``read_commit``'s time, which checks the record again before data are read by it.

    Raises:
        DamagedStoreError: as ``read_commit``.
    """
    try:
        data = store.storage.read(record_path(layer, record.task, record.generation))
        found = json.loads(unseal_record(data))
        num, digest = found["rows"]["pairs"], found["pairs_sha256"]
        whole = (found["layer"], found["task"], found["generation"]) == (layer, *astuple(record))
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        whole = False
    if whole and isinstance(digest, str) and isinstance(num, int) and num >= 0:
        return num, digest
    commit = read_commit(store.storage, layer, record)  # says what is wrong with it
    return commit.rows["pairs"], commit.pairs_sha256


def _read_together(read: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[list[Result]]:
    """Yield what is read of all items, in order, some thousand at a time.

    A thread takes some items at once: handing over each alone costs more than a local read.
    """
    size = min(max(len(items) // (4 * _NUM_READERS), 1), _MAX_HANDED)

    def read_some(some: Sequence[Item]) -> list[Result]:
        return [read(item) for item in some]

    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for start in range(0, len(items), _AT_ONCE):
            now = items[start : start + _AT_ONCE]
            parts = pool.map(read_some, [now[at : at + size] for at in range(0, len(now), size)])
            yield [result for part in parts for result in part]
