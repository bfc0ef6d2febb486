"""Every reject of a store, one by one: which task, which sample, member or pair, and why.

The table of records tells which tasks have any; only of those are the files of rejects read.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.base.progress import Progress
from pipeline.base.progress_text import make_printable
from pipeline.base.whole_file import open_whole
from pipeline.base.yaml import SpecError
from pipeline.corpus.members import FORMER_REASONS, RejectReason
from pipeline.store.commit import DamagedStoreError, RecordName, read_commit
from pipeline.store.current import list_current
from pipeline.store.layout import REJECTS_SCHEMA
from pipeline.store.read_many import read_many
from pipeline.store.records import RecordTable
from pipeline.store.store import Store
from pipeline.upkeep.inspect import read_records

REJECT_SCHEMA = pa.schema(
    [
        ("layer", pa.string()),
        ("task", pa.string()),
        ("url", pa.string()),  # of the task's tar
        *map(REJECTS_SCHEMA.field, ("key", "phrase", "level", "reason", "detail")),
    ]
)
_AT_ONCE = 128  # tasks whose rejects are in memory together
_GROUP_BYTES = 16_000_000  # of a row group of the Parquet file


class RejectList:
    """The rejects of a store's current commits, in the order of layers and tasks.

    Iterating reads them, once: a table of ``REJECT_SCHEMA`` for each task that has any. ``counts``
    are of those that were read, by reason. ``reasons`` are those to list; by default all.

    Raises:
        SpecError: there is no store, or a reason is unknown.
        DamagedStoreError: a record or a file of rejects cannot be read; names it.
    """

    def __init__(self, store: Store, reasons: Sequence[str] = ()) -> None:
        self._store, self._reasons = store, tuple(reasons)
        self.counts: Counter[str] = Counter()
        self.num_read = 0  # tasks
        places: list[tuple[str, RecordName]] = []  # commits with rejects, or not known to have none
        folders = [x.folder for x in store.list_layers(required=True) if x.kind == "latents"]
        current = {x: dict(sorted(list_current(store, x).current.items())) for x in folders}
        tables = {folder: RecordTable(store, folder, ("rejects",)) for folder in folders}
        read_records(tables, current)
        known = {*RejectReason, *FORMER_REASONS}
        for folder, records in current.items():
            told = tables[folder].select(list(records.values()))["rejects"].to_pylist()
            for record, text in zip(records.values(), told, strict=True):
                found = None if text is None else json.loads(text)
                known.update(found or ())
                if found is None or any(x in found for x in self._reasons or found):
                    places.append((folder, record))
        if unknown := set(self._reasons) - known:
            raise SpecError(
                f"--reason: expected one of {', '.join(sorted(known))}, got "
                f"{', '.join(sorted(unknown))}"
            )
        self._places, self.num_tasks = places, len(places)

    def __iter__(self) -> Iterator[pa.Table]:
        """Yield the rejects of each task that has any."""
        for tables in read_many(self._read, self._places, at_once=_AT_ONCE):
            for table in tables:
                self.num_read += 1
                self.counts.update(table["reason"].to_pylist())
                if table.num_rows:
                    yield table

    def _read(self, place: tuple[str, RecordName]) -> pa.Table:
        try:
            commit = read_commit(self._store.storage, *place)
            table = self._store.read_rejects(commit)
        except DamagedStoreError as error:
            raise DamagedStoreError(
                f"{error}. What else is damaged, and how to encode it anew, is told by: ldznet "
                f"verify {self._store.storage.url}"
            ) from error
        if self._reasons:
            table = table.filter(pc.is_in(table["reason"], pa.array(self._reasons)))
        url = commit.source and commit.source.url
        for name, value in (("layer", commit.layer), ("task", commit.task), ("url", url)):
            table = table.append_column(name, pa.repeat(pa.scalar(value, pa.string()), len(table)))
        return table.select(REJECT_SCHEMA.names).cast(REJECT_SCHEMA)


def format_rejects(table: pa.Table) -> str:
    """Return an indented line a reject, safe on a terminal: task, reason, level, key, detail."""
    lines = []
    for row in table.to_pylist():
        name = row["key"] if row["phrase"] is None else f"{row['key']}: {row['phrase']}"
        parts = (row["task"], row["reason"], row["level"], name, row["detail"])
        lines.append(make_printable("  ".join(("", *map(str, parts)))))
    return "\n".join(lines)


def write_rejects(path: Path, rejects: RejectList) -> None:
    """Write rejects to one Parquet file of ``REJECT_SCHEMA``, a row group at a time.

    Raises:
        DamagedStoreError: as iterating over ``rejects``; what was at ``path`` stays.
        OSError: it cannot be written; what was there stays.
    """
    total = rejects.num_tasks
    with (
        Progress("inspect", total=total, unit="tasks", metrics_path=None) as progress,
        open_whole(path) as file,
        pq.ParquetWriter(file, REJECT_SCHEMA) as writer,
    ):
        waiting, num_bytes = [REJECT_SCHEMA.empty_table()], 0
        for table in rejects:
            waiting.append(table)
            num_bytes += table.nbytes
            progress.update(rejects.num_read, rejects=rejects.counts.total())
            if num_bytes >= _GROUP_BYTES:
                writer.write_table(pa.concat_tables(waiting))
                waiting, num_bytes = [REJECT_SCHEMA.empty_table()], 0
        writer.write_table(pa.concat_tables(waiting))
        progress.update(rejects.num_read)
