"""Which records of a layer are read: neither those of retired tasks, nor two contents of one tar.

A listing tells it for tasks that have one record. Of the others, those that were repaired, renewed
or retired, the table of records is asked.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.spec.layer import LayerSpec
from pipeline.store.commit import GONE, RecordName, list_generations
from pipeline.store.records import read_rows
from pipeline.store.store import Store
from pipeline.store.task_ids import list_part_ids, parse_part_id

_COLUMNS = ("status", "pairs_sha256", "source_sha256", "content_since", "latents_generation")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LayerRecords:
    """The records of a layer at one listing, by task.

    ``newest`` says what the next generation of a task is. ``current`` are the records that are
    read; a task without one is missing, unless it is in ``retired``. Of a tar in parts all are
    retired where one is, also those that have no record.
    """

    newest: Mapping[str, RecordName]
    current: Mapping[str, RecordName]
    retired: frozenset[str] = frozenset()


def list_current(store: Store, layer: str) -> LayerRecords:
    """List a latents layer's records. Of a tar in parts all current ones are of one content.

    While a tar in parts is renewed that is the content of which most parts are there, and of two
    the later. A record that cannot be read counts as current: reading it says what is wrong.

    Raises:
        NewerRecordError: a later version of ldznet has written one.
        OSError: the storage fails or denies access.
    """
    generations = list_generations(store.storage, layer)
    newest = {task: RecordName(task, numbers[-1]) for task, numbers in generations.items()}
    later = {task: record for task, record in newest.items() if record.generation > 0}
    if not later:
        return LayerRecords(newest, newest)
    tars = {found[0]: found[2] for task in later if (found := parse_part_id(task))}
    asked = list(later.values())
    for tar_id, num_parts in tars.items():
        parts = (part for part in list_part_ids(tar_id, num_parts) if part in generations)
        asked += (RecordName(part, number) for part in parts for number in generations[part])
    rows = _read_rows(store, layer, asked)
    status = {task: rows[record].get("status") or "stored" for task, record in later.items()}
    retired = {task for task, said in status.items() if said in ("retired", "removed")}
    for tar_id, num_parts in tars.items():
        part_ids = list_part_ids(tar_id, num_parts)
        retired |= set() if retired.isdisjoint(part_ids) else set(part_ids)
    current = {
        task: record
        for task, record in newest.items()
        if task not in retired and status.get(task, "stored") == "stored"
    }
    for tar_id, num_parts in tars.items():
        parts = (part for part in list_part_ids(tar_id, num_parts) if part in current)
        stored = [part for part in parts if rows[newest[part]]["status"] is not None]
        chosen = _choose_content(stored, generations, rows) if stored else {}
        for part in stored:
            del current[part]
        current |= chosen
    return LayerRecords(newest, current, frozenset(retired))


def _choose_content(
    parts: Sequence[str], generations: Mapping[str, Sequence[int]], rows: Mapping[RecordName, Row]
) -> dict[str, RecordName]:
    """Return the records of the content of a tar of which most parts are there."""
    contents: defaultdict[str | None, dict[str, RecordName]] = defaultdict(dict)
    for part in parts:
        for record in _list_readable(part, generations[part], rows):  # the newest of each stays
            contents[rows[record].get("source_sha256")][part] = record
    ranked = contents.values()
    return max(ranked, key=lambda x: (len(x), max(record.generation for record in x.values())))


def _list_readable(
    task: str, generations: Sequence[int], rows: Mapping[RecordName, Row]
) -> list[RecordName]:
    """Return the records of a task, ascending, whose files ``gc`` has not removed."""
    found: list[RecordName] = []
    for number in generations:
        record = RecordName(task, number)
        status = rows[record]["status"]  # None: the record cannot be read
        if status in GONE:
            found = []
        elif status == "stored":
            found.append(record)
    return found


def list_over(
    store: Store, layer: str, latents_layer: str, latents: Mapping[str, RecordName]
) -> LayerRecords:
    """List the records of a features layer; current ones are of the content of their ``latents``.

    ``latents`` are the current records of the layer below. Where a task's latents are of another
    content than its features, or where these are retired and the latents are not, the features are
    missing. Raises as ``list_current``.
    """
    generations = list_generations(store.storage, layer)
    newest = {task: RecordName(task, numbers[-1]) for task, numbers in generations.items()}
    current = {}
    doubtful = []
    for task, record in newest.items():
        below = latents.get(task)
        if below is not None and record.generation == below.generation == 0:
            current[task] = record
        elif below is not None:
            doubtful.append(task)
    if doubtful:
        over = [RecordName(task, number) for task in doubtful for number in generations[task]]
        rows = _read_rows(store, layer, over)
        below_rows = _read_rows(store, latents_layer, [latents[task] for task in doubtful])
        for task in doubtful:
            status = rows[newest[task]]["status"]
            if status is None:
                current[task] = newest[task]  # it cannot be read, and reading it says so
            if status != "stored":
                continue
            for record in _list_readable(task, generations[task], rows):  # the newest that agrees
                if is_of_content(rows[record], below_rows[latents[task]]):
                    current[task] = record
    return LayerRecords(newest, current)


def list_layers_current(store: Store, layers: Iterable[LayerSpec]) -> dict[str, LayerRecords]:
    """Return the records of some layers by folder, those of features over their latents'.

    Latents are listed first: a task commits them before its features, so that one committed
    meanwhile is never seen as latents alone. Raises as ``list_current``.
    """
    latents: dict[str, LayerRecords] = {}
    found: dict[str, LayerRecords] = {}
    for layer in sorted(layers, key=lambda layer: layer.kind != "latents"):
        below = layer.folder if layer.kind == "latents" else layer.latents_folder
        if below not in latents:
            latents[below] = list_current(store, below)
        found[layer.folder] = latents[below]
        if layer.folder != below:
            over = list_over(store, layer.folder, below, latents[below].current)
            retired = latents[below].retired & over.newest.keys()
            found[layer.folder] = replace(over, retired=retired)
    return found


def is_of_content(row: Row, latents: Row) -> bool:
    """Return whether a stored features record was made from the content of a latents record.

    Both are rows of the table of records. A features record of version 1 names no SHA-256 of its
    source, but a generation of its latents, and contents follow one another by generations.
    """
    if row["status"] != "stored" or row["pairs_sha256"] != latents["pairs_sha256"]:
        return False
    if row["source_sha256"] and latents["source_sha256"]:
        return bool(row["source_sha256"] == latents["source_sha256"])
    return (row["latents_generation"] or 0) >= (latents["content_since"] or 0)


def find_repairs(
    store: Store, pinned: Mapping[str, Sequence[RecordName]]
) -> dict[str, dict[RecordName, RecordName]]:
    """Return by layer which pinned records have a repair, and the newest of each.

    ``pinned`` are records of a latents layer and of features over it, by layer. A repair is a later
    generation with the pinned one's source SHA-256 and ``pairs_sha256``, whatever is between them.
    Where a pinned record cannot be read, its task's in the other layer says which content it was;
    where a digest is not told, as by the first ldznet, there is no repair.

    Raises as ``list_current``. Costs a listing a layer, and the records of tasks with a later one.
    """
    found: dict[str, dict[RecordName, RecordName]] = {}
    for layer, records in pinned.items():
        generations = list_generations(store.storage, layer)
        later = {
            record: numbers
            for record in records
            if (numbers := [n for n in generations.get(record.task, ()) if n > record.generation])
        }
        asked = [RecordName(record.task, n) for record in later for n in later[record]]
        rows = _read_rows(store, layer, [*later, *asked]) if later else {}
        unread = {record.task for record in later if rows[record]["status"] is None}
        contents = {record.task: rows[record] for record in later if record.task not in unread}
        for other in (pinned.keys() - {layer}) if unread else ():
            over = [record for record in pinned[other] if record.task in unread]
            contents |= {r.task: row for r, row in _read_rows(store, other, over).items()}
        found[layer] = {
            record: newer
            for record, numbers in later.items()
            for newer in _list_readable(record.task, numbers, rows)  # of several the last stays
            if _is_repair(rows[newer], contents.get(record.task, {}))
        }
    return found


def _is_repair(row: Row, pinned: Row) -> bool:
    """Return whether two rows of the table of records tell the same content, and both tell it."""
    digests = [pinned.get(name) for name in ("pairs_sha256", "source_sha256")]
    return all(digests) and digests == [row["pairs_sha256"], row["source_sha256"]]


def _read_rows(store: Store, layer: str, records: Iterable[RecordName]) -> dict[RecordName, Row]:
    """Return what the table of records says of some; of nulls where one cannot be read."""
    wanted = list(dict.fromkeys(records))
    return dict(zip(wanted, read_rows(store, layer, wanted, _COLUMNS).to_pylist(), strict=True))
