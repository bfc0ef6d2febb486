"""The pairs of a snapshot's tasks, by number from 0, in task and row order.

Data flow: commit records -> pairs a task, with a choice the rows of each that are read -> a pair
number -> (task, row) -> of that task's index the rows that arrays are read by, and keys and phrases
only where they are asked for; of both the last used are kept. What is kept for ever is some 100
bytes a task, 4 a pair where not all are read, and 8 where one view of several is.
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

from pipeline.base.lru_cache import LruCache
from pipeline.base.yaml import SpecError
from pipeline.read.choice import PairChoice
from pipeline.read.view_samples import ViewGroups, ViewSamples, check_numbers, group_views
from pipeline.spec.layer import LayerSpec
from pipeline.store.commit import (
    Commit,
    DamagedStoreError,
    RecordName,
    read_commit,
    record_path,
    unseal_record,
)
from pipeline.store.store import Store

COLUMNS = ("key", "view", "phrase", "latent_row", "text_row", "mask_area")
ROWS_BYTES = 320 * 2**20  # kept: of 10^5 tasks of 1,000 pairs, or 500,000 of 100
TEXTS_BYTES = 256 * 2**20  # of some million pairs, where they are asked for at all
_COMMITS = 1024  # kept, 30 KB each: a task's arrays are opened one after another
_ROWS_BYTES = 384  # a task's rows beside their values, and their place among those kept
_NUM_READERS = 32  # of records and indexes: latency is what they cost
_MAX_HANDED = 64
_AT_ONCE = 16384

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The arrays' rows of a task's pairs: unsigned (pairs,), None where it is the pair's own."""

    views: np.ndarray | None
    prompts: np.ndarray | None

    def find_views(self, pairs: list[int]) -> list[int]:
        """Return the rows of views of some pairs of the task."""
        return pairs if self.views is None else self.views[pairs].tolist()

    def find_prompts(self, pairs: list[int]) -> list[int]:
        """Return the rows of prompts of some pairs of the task."""
        return pairs if self.prompts is None else self.prompts[pairs].tolist()

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        columns = (self.views, self.prompts)
        return _ROWS_BYTES + sum(column.nbytes for column in columns if column is not None)


@dataclass(frozen=True, slots=True)
class TaskTexts:
    """The texts of a task's pairs."""

    key: pa.Array
    phrase: pa.Array

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        return 1024 + int(self.key.nbytes) + int(self.phrase.nbytes)


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
        self._rows: LruCache[int, TaskRows] = LruCache(ROWS_BYTES, attrgetter("num_bytes"))
        self._texts: LruCache[int, TaskTexts] = LruCache(TEXTS_BYTES, attrgetter("num_bytes"))
        self._commits: LruCache[int, Commit] = LruCache(_COMMITS)
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
        return self._commits.get_or_make(
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
        """Return the rows that a task's index names.

        Raises:
            DamagedStoreError: it is missing or altered, or names a row that the arrays lack.
        """
        return self._rows.get_or_make(
            task, lambda: self._parse_rows(task, self._read_columns(task))
        )

    def read_texts(
        self, groups: Sequence[tuple[int, list[int], list[int]]], num: int
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return keys and phrases of ``num`` pairs: of (task, places, rows in its index) each.

        Raises:
            DamagedStoreError: as ``read_rows``.
        """
        keys, phrases = [""] * num, [""] * num
        for task, places, rows in groups:
            texts = self._texts.get_or_make(task, partial(self._read_task_texts, task))
            for place, row in zip(places, rows, strict=True):
                keys[place], phrases[place] = texts.key[row].as_py(), texts.phrase[row].as_py()
        return tuple(keys), tuple(phrases)

    def _read_task_texts(self, task: int) -> TaskTexts:
        table = self._read_columns(task)
        return TaskTexts(table["key"].combine_chunks(), table["phrase"].combine_chunks())

    def _read_columns(self, task: int) -> pa.Table:
        return self._store.read_index(self.commit(task)).select(COLUMNS).combine_chunks()

    def _parse_rows(self, task: int, table: pa.Table) -> TaskRows:
        commit = self.commit(task)
        latent_row, text_row = (table[name].to_numpy() for name in ("latent_row", "text_row"))
        for column, rows in ((latent_row, "views"), (text_row, "prompts")):
            if len(column) and not (column.min() >= 0 and column.max() < commit.rows[rows]):
                raise DamagedStoreError(
                    f"{commit.data_folder}: its index names a row outside its "
                    f"{commit.rows[rows]} {rows}"
                )
        return TaskRows(_compact(latent_row), _compact(text_row))

    def read_table(self) -> pa.Table:
        """Return the index of every pair that is read, which must fit in memory."""
        parts = _read_together(self._read_chosen, range(len(self._tasks)))
        return pa.concat_tables(table for some in parts for table in some)

    def _read_chosen(self, task: int) -> pa.Table:
        table, rows = self._read_columns(task), self._tasks[task].rows
        self._parse_rows(task, table)
        return table if rows is None else table.take(pa.array(rows))


class FeaturesOf:
    """The features commits over the tasks of a ``PairIndex``, by the same numbers."""

    def __init__(
        self, store: Store, layer: LayerSpec, records: Sequence[RecordName], pairs: PairIndex
    ) -> None:
        self.layer = layer
        self._store = store
        self._commits: LruCache[int, Commit] = LruCache(_COMMITS)
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
        return self._commits.get_or_make(
            task, lambda: read_commit(self._store.storage, self.layer.folder, self._records[task])
        )


def _compact(column: np.ndarray) -> np.ndarray | None:
    """Return rows in as few bytes each as they need, None where they count from 0."""
    if np.array_equal(column, np.arange(len(column))):
        return None
    return column.astype(np.min_scalar_type(int(column.max())))


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
