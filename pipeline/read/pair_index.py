"""The pairs of a snapshot's tasks, by number from 0, in task and row order.

Data flow: the table of records -> pairs a task; with a choice, each task's index -> the rows of it
that are read; so too of a task in which not every pair has a mask, where masks are read. A pair
number -> (task, row) -> the rows of the task's arrays, and keys and phrases only where they are
asked for; of both the last used are kept. What is kept for ever is some 200
bytes a task, 4 a pair where not all are read, and 8 where one view of several is.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.lru_cache import LruCache
from pipeline.read.choice import PairChoice
from pipeline.read.commits import LayerCommits
from pipeline.read.view_samples import ViewGroups, ViewSamples, check_numbers, group_views
from pipeline.spec.layer import LayerSpec
from pipeline.store.commit import DamagedStoreError, RecordName
from pipeline.store.read_many import read_many
from pipeline.store.store import Store
from pipeline.store.task_ids import parse_part_id

_ROW_COLUMNS = ("latent_row", "text_row", "mask_row", "ignore_row")
COLUMNS = ("key", "view", "phrase", "mask_area", "negative", *_ROW_COLUMNS)
NO_ROW = -1  # of a prompt that is not embedded, a negative's mask, a pair without ignore region
ROWS_BYTES = 320 * 2**20  # kept: of 10^5 tasks of 1,000 pairs, or 500,000 of 100
TEXTS_BYTES = 256 * 2**20  # of some million pairs, where they are asked for at all
_TEXTS = ("key", "phrase")
_PROMPTS = ("prompt",)
_ROWS_BYTES = 384  # a task's rows beside their values, and their place among those kept
_INDEXES_AT_ONCE = 16384


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The arrays' rows of a task's pairs: (pairs,) integers, None where it is the pair's own.

    All but ``views`` may be ``NO_ROW``; ``ignores`` is not read where the task has no such region.
    """

    views: np.ndarray | None
    prompts: np.ndarray | None
    masks: np.ndarray | None
    ignores: np.ndarray | None

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        columns = (self.views, self.prompts, self.masks, self.ignores)
        return _ROWS_BYTES + sum(column.nbytes for column in columns if column is not None)


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
        masks: bool = False,  # leave out pairs without a mask that are not negative
        negatives: bool = True,  # with masks; False: leave those out too
    ) -> None:
        self._store = store
        self._may_lack = {"mask_row", "ignore_row"}
        self._may_lack |= {"text_row"} if layer.latents.text == "none" else set()
        self.commits = LayerCommits(store, layer, records)
        self._rows: LruCache[int, TaskRows] = LruCache(ROWS_BYTES, attrgetter("num_bytes"))
        self._texts: LruCache[int, pa.Table] = LruCache(TEXTS_BYTES, _count_bytes)
        self._prompts: LruCache[int, pa.Table] = LruCache(TEXTS_BYTES, _count_bytes)
        self._chosen: list[np.ndarray | None] | None = None  # rows of each index; None: all
        num_pairs, num_masks = self.commits.num_pairs, self.commits.num_masks
        self._partly = masks & (num_masks != num_pairs)  # tasks
        self._negatives = negatives
        self.maskless: list[int] = []  # tasks of pairs of which none is left for want of a mask
        groups: list[ViewGroups] = []
        if by_sample or not choice.takes_all or self._partly.any():
            read = partial(self._choose_rows, choice, by_sample)
            self._chosen = []
            for some in read_many(read, range(len(records)), at_once=_INDEXES_AT_ONCE):
                self._chosen += (rows for rows, _ in some)
                if by_sample:
                    groups.append(ViewGroups.join(group for _, group in some if group is not None))
            lengths = [
                num if rows is None else len(rows)
                for num, rows in zip(num_pairs.tolist(), self._chosen, strict=True)
            ]
            num_pairs = np.array(lengths, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(num_pairs)]).astype(np.int64)
        self.samples = ViewSamples(ViewGroups.join(groups), self.starts) if groups else None

    def _choose_rows(
        self, choice: PairChoice, by_sample: bool, task: int
    ) -> tuple[np.ndarray | None, ViewGroups | None]:
        if choice.takes_all and not (by_sample or self._partly[task]):
            return None, None
        index = self._store.read_index(self.commits.read(task))
        chosen = choice.select(index)
        if self._partly[task]:
            whether = index["mask_row"].is_valid().to_numpy()
            if self._negatives:
                whether = whether | index["negative"].to_numpy()
            if not whether.any():
                self.maskless.append(task)
            chosen = chosen[whether[chosen]]
        rows = None if len(chosen) == index.num_rows else chosen
        return rows, group_views(index, rows) if by_sample else None

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def tasks(self) -> tuple[str, ...]:
        """The ids of the tasks, also of those without a pair that is read."""
        return tuple(record.task for record in self.commits.records)

    def digest(self) -> str:
        """Return 16 hex digits over which samples these are, by number: a repair changes none."""
        digest = hashlib.sha256(self.starts.tobytes())
        for task, pairs in zip(self.tasks, self.commits.pairs_sha256.to_pylist(), strict=True):
            digest.update(f"{task}\0{pairs}\0".encode())
        for rows in self._chosen or ():
            digest.update(b"" if rows is None else rows.tobytes())
        digest.update(b"" if self.samples is None else self.samples.starts.tobytes())
        return digest.hexdigest()[:16]

    def list_tars(self) -> Iterator[tuple[str, tuple[str, tuple[int, int] | None]]]:
        """Yield each task of which pairs are read, and its tar's SHA-256 and which part it is."""
        lengths = np.diff(self.starts).tolist()
        digests = self.commits.source_sha256.to_pylist()
        for task, num, sha256 in zip(self.tasks, lengths, digests, strict=True):
            part = parse_part_id(task)
            if num:
                yield task, (sha256, part and part[1:])

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each pair's task and row in the task's index, int64; IndexError for no pair."""
        check_numbers(numbers, len(self), "pair")
        tasks = np.searchsorted(self.starts, numbers, side="right") - 1
        rows = numbers - self.starts[tasks]
        if self._chosen is None:
            return tasks, rows
        for task in np.unique(tasks):
            chosen = self._chosen[task]
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
        """Return keys and phrases of pairs, by (task, places, rows); raises as ``read_rows``."""
        keys, phrases = [""] * num, [""] * num
        for task, places, rows in groups:
            texts = self._texts.get_or_make(task, partial(self._read_columns, task, _TEXTS))
            key, phrase = texts.columns
            for place, row in zip(places, rows, strict=True):
                keys[place], phrases[place] = key[row].as_py(), phrase[row].as_py() or ""
        return tuple(keys), tuple(phrases)

    def read_prompts(self, task: int, rows: Sequence[int]) -> list[str]:
        """Return the prompts of some rows of a task's index; raises as ``read_rows``."""
        read = partial(self._read_columns, task, _PROMPTS)
        prompts = self._prompts.get_or_make(task, read)["prompt"]
        return [prompts[row].as_py() for row in rows]

    def _read_columns(self, task: int, columns: Sequence[str] = COLUMNS) -> pa.Table:
        return self._store.read_index(self.commits.read(task)).select(columns).combine_chunks()

    def _parse_rows(self, task: int, table: pa.Table) -> TaskRows:
        commit = self.commits.read(task)
        fields = {}
        for name, rows in zip(_ROW_COLUMNS, ("views", "prompts", "masks", "ignores"), strict=True):
            given = table[name].drop_null().to_numpy()
            lacks = len(given) < table.num_rows and name not in self._may_lack
            if lacks or (len(given) and not 0 <= given.min() <= given.max() < commit.rows[rows]):
                raise DamagedStoreError(
                    f"{commit.data_folder}: its index names a row outside its "
                    f"{commit.rows[rows]} {rows}, or none"
                )
            is_read = rows != "ignores" or commit.rows[rows]
            column = pc.fill_null(table[name], NO_ROW).to_numpy()
            fields[rows] = _compact(column) if is_read else None
        return TaskRows(**fields)

    def read_table(self, more: Sequence[str] = ()) -> pa.Table:
        """Return ``COLUMNS`` and some more of every pair that is read; they must fit in memory."""
        tasks = range(len(self.commits.records))
        read = partial(self._read_chosen, more=more)
        parts = read_many(read, tasks, at_once=_INDEXES_AT_ONCE)
        return pa.concat_tables(table for some in parts for table in some)

    def _read_chosen(self, task: int, more: Sequence[str]) -> pa.Table:
        table = self._read_columns(task, (*COLUMNS, *more))
        self._parse_rows(task, table)
        rows = None if self._chosen is None else self._chosen[task]
        return table if rows is None else table.take(pa.array(rows))


def take_rows(column: np.ndarray | None, pairs: list[int]) -> list[int]:
    """Return the rows of some pairs of a task, by a column of its ``TaskRows``."""
    return pairs if column is None else column[pairs].tolist()


def _count_bytes(texts: pa.Table) -> int:
    return 1024 + int(texts.nbytes)  # and what Python's objects take


def _compact(column: np.ndarray) -> np.ndarray | None:
    """Return rows in as few bytes each as they need, None where they count from 0."""
    if np.array_equal(column, np.arange(len(column))):
        return None
    least = np.min_scalar_type(int(column.max()))
    return column.astype(least if column.min() >= 0 else np.promote_types(least, np.int8))
