"""A table of what commit records say, so that each record is read once and not by every run.

Listing 100,000 records takes a hundred requests, reading them 100,000. Who reads records keeps a
row of each in ``LAYER/inventory/records-3-<digest>.table``, and the next reads those few files.
The table is a cache: a row describes a record that existed and never changes, but which records
count is decided by the listing of ``commits/`` alone. It may be deleted at any time, and nothing
is kept where the store may not be written.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, NonNegativeInt

from pipeline.store.commit import (
    Accounting,
    Commit,
    DamagedStoreError,
    Marks,
    RecordName,
    read_commit,
    record_path,
    unseal_record,
)
from pipeline.store.kept_table import KeptTable
from pipeline.store.read_many import read_many
from pipeline.store.store import Store

_COUNTS = ("pairs", "views", "prompts", "masks", "ignores")  # of a commit's rows
RECORDS_SCHEMA = pa.schema(
    [
        ("record", pa.string()),  # <task>.<generation>
        ("committed_s", pa.float64()),  # since the epoch, by the storage's clock; null: not told
        *((name, pa.int64()) for name in (*_COUNTS, "num_bytes")),
        *(  # null but in a latents layer; dictionaries as JSON
            (name, pa.string() if name in ("rejects", "notes") else pa.int64())
            for name in Accounting.model_fields
        ),
        ("status", pa.string()),
        ("pairs_sha256", pa.string()),
        ("source_sha256", pa.string()),  # of the tar that the latents, or those below, are from
        ("content_since", pa.int64()),
        ("latents_generation", pa.int64()),  # null in a latents layer
        ("url", pa.string()),  # of the tar; null but in a latents layer, as all below
        ("tar_bytes", pa.int64()),
        ("head_sha256", pa.string()),  # of the tar's first 64 KiB
        *((name, pa.string()) for name in Marks.model_fields),
    ]
)
READ_AT_ONCE = 4096  # kept as they come: who interrupts a first run loses no more
MIN_KEPT = 256  # fewer fresh rows than these are not worth a file


class _FileBytes(BaseModel):
    num_bytes: NonNegativeInt


class _Record(Commit):
    """What a row needs of a record: half the time of reading all of its files' names and sums."""

    files: tuple[_FileBytes, ...]  # type: ignore[assignment]


class RecordTable:
    """The known records of one layer, a row each. Opening reads what the store keeps.

    ``columns`` are those of ``RECORDS_SCHEMA`` that are wanted; the others take no memory.
    """

    def __init__(
        self, store: Store, layer: str, columns: Iterable[str] = RECORDS_SCHEMA.names
    ) -> None:
        self._store, self._layer = store, layer
        self._columns = ["record", *(name for name in columns if name != "record")]
        self._kept = KeptTable(store.storage, inventory_folder(layer), "records-3", RECORDS_SCHEMA)
        self._known = self._kept.read(self._columns)

    def count_unread(self, records: Sequence[RecordName]) -> int:
        """Return how many of these records are not known."""
        return len(self._list_unread(records))

    def read(
        self,
        records: Sequence[RecordName],
        *,
        on_read: Callable[[int], None] | None = None,
        faults: dict[str, str] | None = None,
    ) -> None:
        """Read those of these records that are not known, and keep their rows in the store.

        Args:
            on_read: is called with how many were read, some at a time.
            faults: takes task → error of the records that cannot be read.

        Raises:
            DamagedStoreError: a record cannot be read, and no ``faults`` were given.
        """
        unread = self._list_unread(records)
        # One listing, not a request a record.
        times = self._list_times() if len(unread) >= MIN_KEPT else {}

        def read(record: RecordName) -> dict[str, Any] | None:
            try:
                row = _read_row(self._store, self._layer, record)
            except DamagedStoreError as error:
                if faults is None:
                    raise
                faults[record.task] = str(error)
                return None
            return row | {"committed_s": self._find_time(times, record)}

        for some in read_many(read, unread, at_once=READ_AT_ONCE):
            rows = [row for row in some if row is not None]
            fresh = pa.Table.from_pylist(rows, schema=RECORDS_SCHEMA)
            self._known = pa.concat_tables([self._known, fresh.select(self._columns)])
            self._kept.add(fresh, at_least=MIN_KEPT)
            if on_read is not None:
                on_read(len(some))

    def select(self, records: Sequence[RecordName]) -> pa.Table:
        """Return a row a record, in their order; of nulls where a record is not known."""
        places = pc.index_in(_list_keys(records), value_set=self._known["record"])
        return self._known.combine_chunks().take(places)

    def find_unread_times(self, records: Sequence[RecordName]) -> list[float]:
        """Return when those records were created that are not known, where that can be told."""
        unread = self._list_unread(records)
        listed = self._list_times() if unread else {}
        times = [self._find_time(listed, record) for record in unread]
        return [seconds for seconds in times if seconds is not None]

    def _find_time(self, listed: Mapping[str, float], record: RecordName) -> float | None:
        path = record_path(self._layer, record.task, record.generation)
        seconds = listed.get(path.rsplit("/", 1)[-1])
        return self._store.storage.find_time(path) if seconds is None else seconds

    def _list_times(self) -> dict[str, float]:
        return self._store.storage.list_times(f"{self._layer}/commits")

    def _list_unread(self, records: Sequence[RecordName]) -> list[RecordName]:
        known = pc.is_in(_list_keys(records), value_set=self._known["record"]).to_pylist()
        return [record for record, there in zip(records, known, strict=True) if not there]


def read_rows(
    store: Store, layer: str, records: Sequence[RecordName], columns: Iterable[str]
) -> pa.Table:
    """Return what the table says of some records, in their order; nulls where one is unreadable."""
    table = RecordTable(store, layer, columns)
    table.read(records, faults={})
    return table.select(records)


def inventory_folder(layer: str) -> str:
    """Return where a layer's table of records lies in the store."""
    return f"{layer}/inventory"


def _read_row(store: Store, layer: str, record: RecordName) -> dict[str, Any]:
    """Return what a row says of a record, without its time; raises as ``read_commit``."""
    path = record_path(layer, record.task, record.generation)
    try:
        found = _Record.model_validate_json(unseal_record(store.storage.read(path)))
    except (ValueError, FileNotFoundError):
        found = None
    named = (layer, record.task, record.generation)
    if found and (found.layer, found.task, found.generation) == named:
        return describe_commit(found)
    return describe_commit(read_commit(store.storage, layer, record))  # says what is wrong with it


def describe_commit(commit: Commit) -> dict[str, Any]:
    """Return what a row of ``RECORDS_SCHEMA`` says of a commit, without its time."""
    tar = commit.source
    accounting = dict(commit.accounting or ())
    for name in ("rejects", "notes"):
        if accounting.get(name) is not None:
            accounting[name] = json.dumps(accounting[name], sort_keys=True)
    return {
        "record": _name_record(RecordName(commit.task, commit.generation)),
        **{name: commit.rows[name] for name in _COUNTS},
        "num_bytes": commit.num_bytes,
        **accounting,
        "status": commit.status,
        "pairs_sha256": commit.pairs_sha256,
        "source_sha256": tar.sha256 if tar else commit.source_sha256,
        "content_since": commit.content_since,
        "latents_generation": commit.latents_generation,
        "url": tar and tar.url,
        "tar_bytes": tar and tar.num_bytes,
        "head_sha256": tar and tar.head_sha256,
        **dict(tar.marks if tar else ()),
    }


def _list_keys(records: Sequence[RecordName]) -> pa.Array:
    return pa.array([_name_record(record) for record in records], pa.string())


def _name_record(record: RecordName) -> str:
    return f"{record.task}.{record.generation:04d}"
