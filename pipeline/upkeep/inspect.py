"""What a store holds, from its specs and commit records alone; safe beside a run that writes it.

Every inspection lists each layer's records, and reads those that the table of records lacks.
"""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.progress import Progress
from pipeline.corpus.known_tars import LayerTars
from pipeline.corpus.tasks import Task
from pipeline.spec.layer import LayerSpec
from pipeline.store.commit import RecordName
from pipeline.store.current import LayerRecords, list_layers_current
from pipeline.store.records import RecordTable
from pipeline.store.store import Store
from pipeline.upkeep.summary import LayerSummary, StoreSummary, WindowSums, describe_differences

_COLUMNS = (
    *("committed_s", "pairs", "views", "prompts", "masks", "ignores", "num_bytes"),
    *("stored_samples", "rejected_samples", "rejected_members", "rejected_pairs"),
    *("set_aside_members", "rejects", "notes"),
)
WINDOWS_S = {"10 min": 600, "1 h": 3600, "24 h": 86400}  # what "lately" means
LONG_READ = 2000  # records to read from which on progress is shown


class StoreInspector:
    """Summarises a store as often as asked; records that were read once are not read again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tables: dict[str, RecordTable] = {}

    def summarise(self, *, fast: bool = False, tars: Sequence[Task] = ()) -> StoreSummary:
        """Summarise every layer.

        Args:
            fast: read no record: sums are of those that the table of records knows.
            tars: those of a corpus (``list_tasks``), to say how much of it is there.

        Raises:
            SpecError: there is no store.
            DamagedStoreError: a spec or a commit record cannot be read.
        """
        layers = self._store.list_layers(required=True)
        listed = list_layers_current(self._store, layers)
        for layer in layers:
            if layer.folder not in self._tables:
                self._tables[layer.folder] = RecordTable(self._store, layer.folder, _COLUMNS)
        if not fast:
            read_records(self._tables, {folder: x.current for folder, x in listed.items()})
        summaries = [self._summarise(layer, listed, layers, tars) for layer in layers]
        return StoreSummary(summaries, describe_differences(layers))

    def _summarise(
        self,
        layer: LayerSpec,
        listed: Mapping[str, LayerRecords],
        layers: Sequence[LayerSpec],
        tars: Sequence[Task],
    ) -> LayerSummary:
        there, known = listed[layer.folder].current, self._tables[layer.folder]
        names = list(there.values())
        table = known.select(names)
        below = layer.folder if layer.kind == "latents" else layer.latents_folder
        latents = listed[below].current if below in listed else {}
        corpus = None
        if tars:
            split_bytes = next((x.split_bytes for x in layers if x.folder == below), None)
            known_tars = LayerTars(self._store, below, latents.values())
            corpus = [task for tar in tars for task in known_tars.list_ids(tar, split_bytes)]
        newest, recent = _find_recent(table, known.find_unread_times(names))
        return LayerSummary(
            folder=layer.folder,
            model=str(layer.source["model"]),
            section=layer.section,
            num_tasks=len(there),
            rows={name: _add(table, name) for name in ("pairs", "views", "prompts")},
            num_masks=_add(table, "masks"),
            num_ignores=_add(table, "ignores"),
            num_bytes=_add(table, "num_bytes"),
            stored_samples=_add(table, "stored_samples"),
            rejected_samples=_add(table, "rejected_samples"),
            rejected_members=_add(table, "rejected_members"),
            rejected_pairs=_add(table, "rejected_pairs"),
            set_aside_members=_add(table, "set_aside_members"),
            rejects=_add_counts(table["rejects"]),
            notes=_add_counts(table["notes"]),
            num_untold=table["rejects"].null_count - table["stored_samples"].null_count,
            num_read=table.num_rows - table["record"].null_count,
            num_behind=len(latents.keys() - there.keys()) if layer.kind == "features" else None,
            num_corpus=None if corpus is None else len(corpus),
            num_of_corpus=None if corpus is None else sum(task in there for task in corpus),
            num_retired=len(listed[layer.folder].retired),
            newest=newest,
            recent=recent,
        )


def read_records(
    tables: Mapping[str, RecordTable], records: Mapping[str, Mapping[str, RecordName]]
) -> None:
    """Read records that the tables lack, with progress where many; raises as their ``read``."""
    listed = {folder: list(found.values()) for folder, found in records.items()}
    num_unread = sum(tables[folder].count_unread(names) for folder, names in listed.items())
    progress = Progress("inspect", total=num_unread, unit="records", metrics_path=None)
    num_done = 0

    def count(num: int) -> None:
        nonlocal num_done
        num_done += num
        progress.update(num_done)

    with progress if num_unread >= LONG_READ else nullcontext():
        for folder, names in listed.items():
            tables[folder].read(names, on_read=count)


def inspect_store(url: str) -> list[LayerSummary]:
    """Summarise every layer of a store once; raises as ``StoreInspector.summarise``."""
    return StoreInspector(Store.open(url)).summarise().layers


def _add(table: pa.Table, name: str) -> int:
    return int(pc.sum(table[name]).as_py() or 0)


def _add_counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Add up dictionaries of counts, which are JSON; the largest sum first."""
    total: Counter[str] = Counter()
    for found in pc.value_counts(column.drop_null()).to_pylist():  # most tasks have equal ones
        for name, number in json.loads(found["values"]).items():
            total[name] += number * found["counts"]
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _find_recent(table: pa.Table, unread_s: Sequence[float]) -> tuple[str | None, list[WindowSums]]:
    """Return when the newest record was created, and what was in each of the last windows.

    ``table`` has nulls for records that were not read; ``unread_s`` are the times of those. A
    newest record of the future, where clocks differ, is taken for now.
    """
    times = table["committed_s"]
    told = pc.min_max(times).as_py()
    known = [*unread_s, *(seconds for seconds in told.values() if seconds is not None)]
    if not known:
        return None, []
    now_s = max(time.time(), *known)
    recent = []
    for window, window_s in WINDOWS_S.items():
        part = table.filter(pc.greater_equal(times, now_s - window_s))
        num_unread = sum(seconds >= now_s - window_s for seconds in unread_s)
        pairs, num_bytes = (None if num_unread else _add(part, x) for x in ("pairs", "num_bytes"))
        seconds = min(float(window_s), max(now_s - min(known), 1.0))
        recent.append(
            WindowSums(window, window_s, part.num_rows + num_unread, pairs, num_bytes, seconds)
        )
    return datetime.fromtimestamp(max(known), UTC).isoformat(timespec="seconds"), recent
