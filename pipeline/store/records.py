"""Which tars a layer's commits were read from, without reading every record again.

A record is a file of its own; listing 100,000 names takes a few requests, reading them 100,000.
So a run keeps the sources of what it saw under ``inventory/<digest>.parquet`` of the layer, and
the next one reads those few files and only the records that none of them covers. A file holds
facts of records, which never change: it is a cache, says nothing of what is committed, and may be
deleted at any time.
"""

import hashlib
import io
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather as feather
import pyarrow.parquet as pq

from pipeline.store.commit import DamagedStoreError, RecordName, read_commit, record_path
from pipeline.store.store import Store

logger = logging.getLogger(__name__)
COUNTS = (
    *("pairs", "views", "prompts", "num_bytes"),
    *("stored_samples", "rejected_samples", "rejected_members"),
)
SUMS_SCHEMA = pa.schema(
    [
        ("record", pa.string()),  # <task>.<generation>
        ("committed_s", pa.float64()),  # since the epoch, by the storage's clock; NaN: unknown
        *((name, pa.int64()) for name in COUNTS),
    ]
)
NUM_READERS = 32  # records read at once: latency, not bandwidth, is what they cost
READ_AT_ONCE = 4096  # kept as they come: who interrupts a first look loses no more
MIN_KEPT = 256  # fewer fresh records than these are not worth a file
MAX_FILES = 16  # more than these are joined into one
_PREFIX, _SUFFIX = "sums-", ".feather"


class RecordSums:
    """What is known of one layer's records; ``look`` learns more, which is kept in the store.

    Opening reads what earlier looks kept. Where the store may not be written, nothing is kept.
    """

    def __init__(self, store: Store, layer: str) -> None:
        self._store, self._layer = store, layer
        self._names, tables = self._read_kept()
        self._known = pa.concat_tables([SUMS_SCHEMA.empty_table(), *tables])
        self._num_unkept = 0

    def count_unread(self, records: Sequence[RecordName]) -> int:
        """Return how many of these records no look has read."""
        return len(self._find_unread(records))

    def read(self, records: Sequence[RecordName], *, on_read: Callable[[int], None]) -> None:
        """Read what is not known of these records; ``on_read`` hears how many at a time.

        Raises:
            DamagedStoreError: a record cannot be read.
        """
        unread = self._find_unread(records)
        times = {}
        if len(unread) >= MIN_KEPT:  # one listing, not a request a record
            times = self._list_times()
        with ThreadPoolExecutor(NUM_READERS) as pool:
            for start in range(0, len(unread), READ_AT_ONCE):
                part = unread[start : start + READ_AT_ONCE]
                rows = list(pool.map(partial(self._read_row, times), part))
                fresh = pa.Table.from_pylist(rows, schema=SUMS_SCHEMA)
                self._known = pa.concat_tables([self._known, fresh])
                self._num_unkept += len(rows)
                self._keep()
                on_read(len(rows))

    def select(self, records: Sequence[RecordName]) -> pa.Table:
        """Return the rows (``SUMS_SCHEMA``) of those records that are known, in no order."""
        wanted = pa.array([_key(record) for record in records], pa.string())
        found = pc.index_in(wanted, value_set=self._known["record"]).drop_null()
        return self._known.take(found)

    def find_unread_times(self, records: Sequence[RecordName]) -> list[float]:
        """Return when those records were created that no look has read, where that can be told."""
        unread = self._find_unread(records)
        listed = self._list_times() if unread else {}
        times = [self._find_time(listed, record) for record in unread]
        return [seconds for seconds in times if seconds is not None]

    def _find_time(self, listed: Mapping[str, float], record: RecordName) -> float | None:
        path = record_path(self._layer, record.task, record.generation)
        seconds = listed.get(path.rsplit("/", 1)[-1])
        return self._store.storage.find_time(path) if seconds is None else seconds

    def _list_times(self) -> dict[str, float]:
        return self._store.storage.list_times(f"{self._layer}/commits")

    def _find_unread(self, records: Sequence[RecordName]) -> list[RecordName]:
        names = pa.array([_key(record) for record in records], pa.string())
        there = pc.is_in(names, value_set=self._known["record"]).to_pylist()
        return [record for record, known in zip(records, there, strict=True) if not known]

    def _read_row(self, times: Mapping[str, float], record: RecordName) -> dict[str, Any]:
        commit = read_commit(self._store.storage, self._layer, record)
        accounting = commit.accounting.model_dump() if commit.accounting else {}
        seconds = self._find_time(times, record)
        return {
            "record": _key(record),
            "committed_s": math.nan if seconds is None else seconds,
            "num_bytes": commit.num_bytes,
            **dict.fromkeys(COUNTS[4:], 0),
            **commit.rows,
            **{name: count for name, count in accounting.items() if name in COUNTS},
        }

    def _read_kept(self) -> tuple[list[str], list[pa.Table]]:
        names, tables = [], []
        for name in self._store.storage.list_names(self._folder):
            if not (name.startswith(_PREFIX) and name.endswith(_SUFFIX)):
                continue
            path = f"{self._folder}/{name}"
            try:
                data = self._store.storage.read(path)
            except FileNotFoundError:
                continue  # joined with others by another look meanwhile
            if _name_of(data) != name:
                logger.warning("%s: is damaged and not used; it is a cache, remove it", path)
                continue
            names.append(name)
            tables.append(feather.read_table(io.BytesIO(data)).cast(SUMS_SCHEMA))
        return names, tables

    def _keep(self) -> None:
        """Write what was learned since the last time; join the files where there are many."""
        if self._num_unkept < MIN_KEPT:
            return
        joined = len(self._names) >= MAX_FILES
        start = 0 if joined else self._known.num_rows - self._num_unkept
        buffer = io.BytesIO()
        feather.write_feather(
            self._known.slice(start).combine_chunks(), buffer, compression="zstd", version=2
        )
        data = buffer.getvalue()
        name = _name_of(data)
        try:
            self._store.storage.create(f"{self._folder}/{name}", data)
        except OSError as error:  # a reader may look without a right to write
            logger.info("%s: what inspect learned is not kept: %s", self._folder, error)
            return
        for old in self._names if joined else []:
            self._store.storage.remove_tree(f"{self._folder}/{old}")
        self._names = [name] if joined else [*self._names, name]
        self._num_unkept = 0

    @property
    def _folder(self) -> str:
        return f"{self._layer}/inventory"


logger = logging.getLogger(__name__)
INVENTORY_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("generation", pa.int32()),
        ("url", pa.string()),
        ("head_sha256", pa.string()),
    ]
)
NUM_READERS = 32  # records read at once: latency, not bandwidth, is what they cost
MAX_FILES = 16  # more than these are joined into one


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a committed task came from: the tar's URL and the SHA-256 of its first 64 KiB."""

    url: str
    head_sha256: str


Origins = dict[tuple[str, int], Origin]  # (task, generation) -> origin


def read_origins(
    store: Store, layer: str, records: Mapping[str, RecordName]
) -> tuple[dict[str, Origin], dict[str, str]]:
    """Return task → origin of a latents layer's records, and task → error of unreadable ones.

    What no inventory covers is read from the records, and a new inventory written of it.
    """
    known, names = _read_inventories(store, layer)
    unknown = [r for r in records.values() if (r.task, r.generation) not in known]
    found, errors = _read_records(store, layer, unknown)
    fresh = {(record.task, record.generation): origin for record, origin in found}
    if len(names) > MAX_FILES:
        joined = _write_inventory(store, layer, known | fresh)
        for name in set(names) - {joined}:  # one of them may have held all of it already
            store.storage.remove_tree(f"{layer}/inventory/{name}")
    elif fresh:
        _write_inventory(store, layer, fresh)
    known |= fresh
    keys = ((task, (record.task, record.generation)) for task, record in records.items())
    return {task: known[key] for task, key in keys if key in known}, errors


def _read_records(
    store: Store, layer: str, records: Iterable[RecordName]
) -> tuple[list[tuple[RecordName, Origin]], dict[str, str]]:
    def read(record: RecordName) -> tuple[RecordName, Origin | str]:
        try:
            source = read_commit(store.storage, layer, record).source
        except DamagedStoreError as error:
            return record, str(error)
        if source is None:
            return record, f"{layer}: the record of {record.task} names no source"
        return record, Origin(source.url, source.head_sha256)

    found: list[tuple[RecordName, Origin]] = []
    errors: dict[str, str] = {}
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for record, answer in pool.map(read, records):
            if isinstance(answer, str):
                errors[record.task] = answer
            else:
                found.append((record, answer))
    return found, errors


def _read_inventories(store: Store, layer: str) -> tuple[Origins, list[str]]:
    """Return what the layer's inventory files hold, and their names."""
    known: Origins = {}
    names = [n for n in store.storage.list_names(f"{layer}/inventory") if n.endswith(".parquet")]
    for name in names:
        path = f"{layer}/inventory/{name}"
        try:
            data = store.storage.read(path)
        except FileNotFoundError:
            continue  # joined with others by another run meanwhile
        if hashlib.sha256(data).hexdigest()[:16] != name.removesuffix(".parquet"):
            logger.warning("%s: is damaged; removed, for it is a cache", path)
            store.storage.remove_tree(path)  # or the same content could not be written anew
            continue
        table = pq.read_table(io.BytesIO(data), schema=INVENTORY_SCHEMA).to_pydict()
        for task, generation, url, head in zip(*table.values(), strict=True):
            known[task, generation] = Origin(url, head)
    return known, names


def _write_inventory(store: Store, layer: str, origins: Origins) -> str:
    """Write origins and return the file's name."""
    rows = [
        {"task": task, "generation": generation, "url": o.url, "head_sha256": o.head_sha256}
        for (task, generation), o in sorted(origins.items())
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=INVENTORY_SCHEMA), buffer, compression="zstd")
    data = buffer.getvalue()
    name = f"{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    store.storage.create(f"{layer}/inventory/{name}", data)
    return name


def _key(record: RecordName) -> str:
    return f"{record.task}.{record.generation:04d}"


def _name_of(data: bytes) -> str:
    return f"{_PREFIX}{hashlib.sha256(data).hexdigest()[:16]}{_SUFFIX}"
