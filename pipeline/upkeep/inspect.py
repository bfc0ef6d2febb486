"""What a store holds, from its specs and commit records alone; safe beside a run that writes it.

Every inspection lists each layer's records, and reads those that the table of records lacks.
"""

import json
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.progress import Progress
from pipeline.base.progress_text import count_noun, format_rate, join_largest
from pipeline.corpus.notes import describe_notes
from pipeline.corpus.tasks import Task, split_tasks
from pipeline.spec.layer import LayerSpec
from pipeline.store.commit import RecordName, list_records
from pipeline.store.records import RecordTable
from pipeline.store.store import Store

_COLUMNS = (
    *("committed_s", "pairs", "views", "prompts", "num_bytes"),
    *("stored_samples", "rejected_samples", "rejected_members", "rejected_pairs"),
    *("rejects", "notes"),
)
WINDOWS_S = {"10 min": 600, "1 h": 3600, "24 h": 86400}  # what "lately" means
_WRAP: dict[str, Any] = {
    "width": 80,
    "subsequent_indent": " " * 9,
    "break_long_words": False,
    "break_on_hyphens": False,
}
LONG_READ = 2000  # records to read from which on progress is shown


@dataclass(frozen=True)
class WindowSums:
    """What was committed in the last ``window_s`` seconds; sums are None where not all was read."""

    window: str
    window_s: int
    num_tasks: int
    num_pairs: int | None
    num_bytes: int | None
    # Of the window that the rate is over: where nothing is older, from its first commit until now.
    seconds: float = field(compare=False)

    def as_text(self) -> str:
        """Return ``10 min: 12 tasks, 340 pairs (0.57/s), 1.2 GB``; no rate of a single task."""
        text = f"{self.window}: {count_noun(self.num_tasks, 'task')}"
        if self.num_pairs is None or self.num_bytes is None:
            return f"{text}{self._say_rate(self.num_tasks)}"
        pairs = f"{count_noun(self.num_pairs, 'pair')}{self._say_rate(self.num_pairs)}"
        return f"{text}, {pairs}, {_format_bytes(self.num_bytes)}"

    def _say_rate(self, number: int) -> str:
        return f" ({format_rate(number / self.seconds)}/s)" if self.num_tasks > 1 else ""


@dataclass(frozen=True)
class LayerSummary:
    """One layer's committed work added up; bytes are of committed files.

    Of ``num_tasks`` that are committed the sums are of ``num_read``: of all, unless ``fast`` left
    out those whose records were not read yet. ``rejects`` are counts by reason, ``notes`` by name;
    ``num_untold`` tasks have records of version 1, which tell neither them nor rejected pairs.
    ``num_behind`` are tasks committed in the latents layer and not in this one, ``num_corpus`` the
    tasks of the corpus asked for and ``num_of_corpus`` those committed; None where there is no such
    thing. Times are by the storage's clock, None where it tells none.
    """

    folder: str
    model: str
    section: dict[str, Any]
    num_tasks: int
    rows: dict[str, int]
    num_bytes: int
    stored_samples: int
    rejected_samples: int
    rejected_members: int
    rejected_pairs: int
    rejects: dict[str, int]
    notes: dict[str, int]
    num_untold: int
    num_read: int
    num_behind: int | None = None
    num_corpus: int | None = None
    num_of_corpus: int | None = None
    newest: str | None = None  # ISO 8601, UTC
    recent: list[WindowSums] = field(default_factory=list)

    def as_text(self) -> str:
        """Return a few lines to read."""
        section = ", ".join(f"{key}: {_plain(value)}" for key, value in self.section.items())
        lines = [
            self.folder,
            f"  model  {self.model}",
            *textwrap.wrap(f"  spec   {section}", **_WRAP),
            f"  holds  {count_noun(self.num_tasks, 'task')}, {self._say_sums()}",
        ]
        if self.folder.startswith("latents-") and self._was_read:
            lines += self._say_input()
        if self.num_corpus is not None:
            lines.append(f"  corpus {self.num_of_corpus} of its {self.num_corpus} tasks committed")
        if self.num_corpus and self.num_tasks and not self.num_of_corpus:
            lines.append("         no task has an id of this corpus: give encode's --root, or its")
            lines.append("         --corpus; ids are of paths below the folder above the patterns")
        if self.num_behind:
            behind = count_noun(self.num_behind, "task")
            lines.append(f"  behind {behind} of its latents layer")
        if self.newest is not None:
            lines.append(f"  newest {self.newest}")
        shown = 0
        for recent in self.recent:
            if recent.num_tasks > shown:  # a longer window with nothing more says nothing more
                lines.append(f"  last   {recent.as_text()}")
                shown = recent.num_tasks
        return "\n".join(lines)

    @property
    def _was_read(self) -> bool:
        return self.num_read > 0 or self.num_tasks == 0

    def _say_input(self) -> list[str]:
        """Return what became of the tars' samples, and why."""
        text = f"  input  {self.stored_samples} samples stored, {self.rejected_samples} rejected"
        others = ((self.rejected_members, "other member"), (self.rejected_pairs, "pair"))
        if any(number for number, _ in others):
            counts = (count_noun(number, noun) for number, noun in others if number)
            text = f"{text}; {', '.join(counts)} rejected"
        if self.rejects:
            text = f"{text} ({join_largest(self.rejects, num=len(self.rejects))})"
            text = f"{text}; --rejects lists them"
        lines = textwrap.wrap(text, **_WRAP)
        if self.num_untold:
            tasks = count_noun(self.num_untold, "task")
            lines.append(f"         rejected pairs and reasons of {tasks} are not in the records,")
            lines.append("         which are of version 1; --rejects reads them")
        return lines + [f"  note   {line}" for line in describe_notes(self.notes)]

    def _say_sums(self) -> str:
        if not self._was_read:
            return "whose records were not read yet: run inspect without --fast once"
        rows = ", ".join(f"{count} {name}" for name, count in self.rows.items()) or "no rows"
        sums = f"{rows}, {_format_bytes(self.num_bytes)}"
        return sums if self.num_read == self.num_tasks else f"in {self.num_read} of them {sums}"


class StoreInspector:
    """Summarises a store as often as asked; records that were read once are not read again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tables: dict[str, RecordTable] = {}

    def summarise(self, *, fast: bool = False, tars: Sequence[Task] = ()) -> "StoreSummary":
        """Summarise every layer.

        Args:
            fast: read no record: sums are of those that the table of records knows.
            tars: those of a corpus (``list_tasks``), to say how much of it is there.

        Raises:
            SpecError: there is no store.
            DamagedStoreError: a spec or a commit record cannot be read.
        """
        layers = self._store.list_layers(required=True)
        # Latents last: a task commits them first, so that none seems to have features alone.
        records = {
            layer.folder: list_records(self._store.storage, layer.folder)
            for layer in reversed(layers)
        }
        for layer in layers:
            if layer.folder not in self._tables:
                self._tables[layer.folder] = RecordTable(self._store, layer.folder, _COLUMNS)
        if not fast:
            read_records(self._tables, records)
        summaries = [self._summarise(layer, records, layers, tars) for layer in layers]
        return StoreSummary(summaries, describe_differences(layers))

    def _summarise(
        self,
        layer: LayerSpec,
        records: Mapping[str, Mapping[str, RecordName]],
        layers: Sequence[LayerSpec],
        tars: Sequence[Task],
    ) -> LayerSummary:
        there, known = records[layer.folder], self._tables[layer.folder]
        names = list(there.values())
        table = known.select(names)
        below = layer.folder if layer.kind == "latents" else layer.latents_folder
        corpus = None
        if tars:  # split as the latents layer splits them
            split_bytes = next((x.split_bytes for x in layers if x.folder == below), None)
            corpus = [task.id for task in split_tasks(tars, split_bytes)]
        newest, recent = _find_recent(table, known.find_unread_times(names))
        return LayerSummary(
            folder=layer.folder,
            model=str(layer.source["model"]),
            section=layer.canonical["section"],
            num_tasks=len(there),
            rows={name: _add(table, name) for name in ("pairs", "views", "prompts")},
            num_bytes=_add(table, "num_bytes"),
            stored_samples=_add(table, "stored_samples"),
            rejected_samples=_add(table, "rejected_samples"),
            rejected_members=_add(table, "rejected_members"),
            rejected_pairs=_add(table, "rejected_pairs"),
            rejects=_add_counts(table["rejects"]),
            notes=_add_counts(table["notes"]),
            num_untold=table["rejects"].null_count - table["stored_samples"].null_count,
            num_read=table.num_rows - table["record"].null_count,
            num_behind=len(records.get(below, {}).keys() - there.keys())
            if layer.kind == "features"
            else None,
            num_corpus=None if corpus is None else len(corpus),
            num_of_corpus=None if corpus is None else sum(task in there for task in corpus),
            newest=newest,
            recent=recent,
        )


def read_records(
    tables: Mapping[str, RecordTable], records: Mapping[str, Mapping[str, RecordName]]
) -> None:
    """Read the records of some layers that their tables lack; with progress where many.

    Raises:
        DamagedStoreError: one cannot be read.
    """
    listed = {folder: list(found.values()) for folder, found in records.items()}
    num_unread = sum(tables[folder].count_unread(names) for folder, names in listed.items())
    if num_unread < LONG_READ:
        for folder, names in listed.items():
            tables[folder].read(names)
        return
    with Progress("inspect", total=num_unread, unit="records", metrics_path=None) as progress:
        num_done = 0

        def count(num: int) -> None:
            nonlocal num_done
            num_done += num
            progress.update(num_done)

        for folder, names in listed.items():
            tables[folder].read(names, on_read=count)


@dataclass(frozen=True)
class StoreSummary:
    """What a store holds at one time."""

    layers: list[LayerSummary]
    differences: list[str]  # lines

    def as_text(self) -> str:
        """Return lines to read."""
        return "\n".join([*(layer.as_text() for layer in self.layers), *self.differences])


def inspect_store(url: str) -> list[LayerSummary]:
    """Summarise every layer of a store once; raises as ``StoreInspector.summarise``."""
    return StoreInspector(Store.open(url)).summarise().layers


def describe_differences(layers: Sequence[LayerSpec]) -> list[str]:
    """Return lines that say in which fields of their specs the layers of one kind differ."""
    lines: list[str] = []
    for kind in ("latents", "features"):
        fields = {x.folder: _flatten(x.canonical) for x in layers if x.kind == kind}
        if len(fields) < 2:
            continue
        lines.append(f"the {kind} layers differ in")
        for key in sorted({key for values in fields.values() for key in values}):
            found = {folder: values.get(key, "nothing") for folder, values in fields.items()}
            if len(set(found.values())) > 1:
                lines.append(f"  {key}")
                lines += [f"    {folder}  {value}" for folder, value in found.items()]
    return lines


def _flatten(canonical: Mapping[str, Any]) -> dict[str, str]:
    """Return a canonical spec as one level of text: a file's digest by its path, the rest by name.

    Nothing of a spec is left out, so two layers always differ in something that is shown.
    """
    flat = {f"weights {path}": digest for path, digest in canonical["weights"].items()}
    flat |= {key: json.dumps(value) for key, value in canonical["section"].items()}
    rest = {k: v for k, v in canonical.items() if k not in ("weights", "section")}
    return flat | {key: json.dumps(value) for key, value in rest.items()}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
        pairs, num_bytes = None, None
        if not num_unread:
            pairs, num_bytes = _add(part, "pairs"), _add(part, "num_bytes")
        seconds = min(float(window_s), max(now_s - min(known), 1.0))
        recent.append(
            WindowSums(window, window_s, part.num_rows + num_unread, pairs, num_bytes, seconds)
        )
    return datetime.fromtimestamp(max(known), UTC).isoformat(timespec="seconds"), recent


def _format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e10 else f"{num_bytes / 1e6:.1f} MB"
