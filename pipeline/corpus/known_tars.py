"""Finds listed tars among those that a latents layer was encoded from, and tells which changed.

A tar is found by any URL that it was seen at; where the corpus moved as a whole, by its path below
the root, if its first bytes agree. What the listing tells of it is compared with what it told when
the tar was encoded. Where that differs the tar has to be read: the caller has it hashed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.corpus.seen_tars import SeenTars
from pipeline.corpus.source import digest_head, is_there
from pipeline.corpus.tasks import Task, first_tar_id, split_tasks, url_tar_id
from pipeline.store.commit import Marks, RecordName
from pipeline.store.read_many import read_many
from pipeline.store.records import RecordTable
from pipeline.store.store import Store
from pipeline.store.task_ids import list_part_ids, parse_part_id

_COLUMNS = (
    *("url", "tar_bytes", "head_sha256", "source_sha256", *Marks.model_fields),
    *("content_since", "samples", "stored_samples"),
)
_AT_ONCE = 4096
NO_DIGESTS: Mapping[str, str] = {}
NO_MARKS = Marks()
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class KnownTar:
    """A listed tar as tasks of a layer: its parts as they were committed, or as it is split now.

    ``rows`` are what the table of records says of the parts whose record can be read, by task.
    """

    tasks: tuple[Task, ...]
    rows: dict[str, Row]

    @property
    def tar(self) -> Task:
        """The tar, as one of its parts names it."""
        return self.tasks[0]

    def list_missing(self) -> list[str]:
        """Return the parts without a record that can be read."""
        return [task.id for task in self.tasks if task.id not in self.rows]

    @property
    def is_half_renewed(self) -> bool:
        """Whether parts are missing of a tar of which others were renewed."""
        is_whole = len(self.rows) == len(self.tasks)
        return not is_whole and any(row["content_since"] for row in self.rows.values())

    @property
    def is_empty(self) -> bool:
        """Whether nothing is stored of it, although it held samples."""
        held, stored = (
            sum(row[name] or 0 for row in self.rows.values())
            for name in ("samples", "stored_samples")
        )
        return held > stored == 0


class LayerTars:
    """The tars that a latents layer has records of.

    ``faults`` has the error of each record that cannot be read, by task; ``seen`` what is known of
    tars beside the records.
    """

    def __init__(self, store: Store, layer: str, newest: Iterable[RecordName]) -> None:
        records = list(newest)
        self.seen = SeenTars(store, layer)
        self.faults: dict[str, str] = {}
        table = RecordTable(store, layer, _COLUMNS)
        table.read(records, faults=self.faults)
        rows = table.select(records)
        self._columns = {name: rows[name].to_pylist() for name in rows.column_names}
        self._places = {record.task: place for place, record in enumerate(records)}
        self._num_parts: dict[str, int] = {}  # by tar
        self._by_url: dict[str, str] = {}
        for record, url in zip(records, self._columns["url"], strict=True):
            tar_id, _, num_parts = parse_part_id(record.task) or (record.task, 0, 1)
            self._num_parts[tar_id] = num_parts
            if url is not None:
                self._by_url[url] = tar_id
            elif record.task not in self.faults:
                self.faults[record.task] = f"{layer}: the record of {record.task} names no source"
        seen = self.seen.tar_ids.items()
        moved = {url: tar_id for url, tar_id in seen if tar_id in self._num_parts}
        self._by_url = moved | self._by_url

    def find(self, tars: Sequence[Task], split_bytes: int | None) -> list[KnownTar]:
        """Return the tasks of each listed tar; a tar that is not known is split now.

        Raises:
            OSError: a tar's first bytes could not be read.
        """
        moved = [tar for tar in tars if tar.url not in self._by_url and not tar.fault]
        moved = [tar for tar in moved if self._list_held(tar)]
        resolved: dict[str, Task] = {}
        for some in read_many(self._resolve_moved, moved, at_once=_AT_ONCE):
            resolved |= {tar.url: tar for tar in some}
        return [self._as_tasks(resolved.get(tar.url, tar), split_bytes) for tar in tars]

    def list_ids(self, tar: Task, split_bytes: int | None) -> list[str]:
        """Return the ids of a listed tar's tasks without asking for the tar."""
        held = next(iter(self._list_held(tar)), tar.id)
        known = replace(tar, id=self._by_url.get(tar.url, held))
        return [task.id for task in self._as_tasks(known, split_bytes).tasks]

    def list_all(self) -> list[KnownTar]:
        """Return every task of the layer as a tar of its own, without a listing of the corpus."""
        found = []
        for task in self._places:
            row = self._row(task)
            _, part, num_parts = parse_part_id(task) or (task, 0, 1)
            tar = Task(task, row["url"] or "", row["tar_bytes"] or 0, part, num_parts)
            found.append(KnownTar((tar,), {task: row}))
        return found

    def _row(self, task: str) -> Row:
        place = self._places[task]
        return {name: column[place] for name, column in self._columns.items()}

    def _list_held(self, tar: Task) -> list[str]:
        """Return the ids that the tar would have and that the layer holds for another URL."""
        return [found for found in (tar.id, first_tar_id(tar)) if found in self._num_parts]

    def _resolve_moved(self, tar: Task) -> Task:
        """Return a tar with the id of the same tar at another URL; else with one of its own.

        A tar of the same path below the root may be one that moved with its corpus, or one of
        another corpus. Its first bytes tell; where they differ, the other is asked for: if it is
        still there, the two are two tars, else this one moved and changed.
        """
        rows = {held: self._row(self._list_parts(held)[0]) for held in self._list_held(tar)}
        if all(row["url"] is None for row in rows.values()):  # no record that can be read
            return replace(tar, id=next(iter(rows)))
        digest = digest_head(tar)
        for held, row in rows.items():
            if (row["head_sha256"], row["tar_bytes"]) == (digest, tar.num_bytes):
                return replace(tar, id=held)
        for held in rows:
            places = [url for url, tar_id in self._by_url.items() if tar_id == held]
            try:
                if not any(map(is_there, places)):
                    return replace(tar, id=held)
            except OSError as error:
                return replace(tar, fault=f"it cannot be told from {held} of the store: {error}")
        return replace(tar, id=url_tar_id(tar))

    def _list_parts(self, tar_id: str) -> list[str]:
        """Return the tasks of a tar that have a record."""
        parts = list_part_ids(tar_id, self._num_parts[tar_id])
        return [part for part in parts if part in self._places]

    def _as_tasks(self, tar: Task, split_bytes: int | None) -> KnownTar:
        tar_id = self._by_url.get(tar.url, tar.id)
        if tar_id not in self._num_parts:
            return KnownTar(tuple(split_tasks([tar], split_bytes)), {})
        num_parts = self._num_parts[tar_id]
        if num_parts == 1:  # nearly all
            rows = {} if tar_id in self.faults else {tar_id: self._row(tar_id)}
            return KnownTar((tar if tar.id == tar_id else replace(tar, id=tar_id),), rows)
        tasks = [
            replace(tar, id=part_id, part=part, num_parts=num_parts)
            for part, part_id in enumerate(list_part_ids(tar_id, num_parts))
        ]
        parts = (part for part in self._list_parts(tar_id) if part not in self.faults)
        rows = {part: self._row(part) for part in parts}
        return KnownTar(tuple(tasks), rows)


@dataclass(frozen=True, slots=True)
class Changes:
    """What became of listed tars since they were encoded.

    ``changed`` has the tasks of tars that hold other bytes, with the SHA-256 where it is known, and
    with them the parts that are missing, which must not be of another version than these;
    ``suspects`` the tars of which only the marks are known to differ, to be hashed. ``num_kept``
    tars changed and were accepted unread before.
    """

    changed: dict[str, str | None]
    suspects: tuple[Task, ...]
    num_kept: int = 0


def find_changes(
    known: Sequence[KnownTar],
    seen: SeenTars,
    digests: Mapping[str, str] = NO_DIGESTS,
    *,
    with_kept: bool = False,
) -> Changes:
    """Compare listed tars with what the records say of them.

    ``digests`` are SHA-256 (hex) of tars that were read now, by URL. ``with_kept`` counts those
    that were accepted unread as changed. A tar whose record has no marks takes those of this
    listing if its first bytes agree.

    Raises:
        OSError: a tar's first bytes could not be read.
    """
    listed = [
        tar
        for tar in known
        if tar.rows
        and not tar.tar.fault
        and (
            tar.tar.url in digests
            or tar.tar.url in seen.tar_ids
            or tar.is_half_renewed
            or not all(_is_same(tar.tar, row) for row in tar.rows.values())
        )
    ]
    heads = _read_heads([tar for tar in listed if _needs_head(tar, seen)], seen)
    changed: dict[str, str | None] = {}
    suspects = []
    num_kept = 0
    for tar in listed:
        url = tar.tar.url
        hashes = {digests[url]} if url in digests else seen.find(tar.tar)
        others = {
            task: row
            for task, row in tar.rows.items()
            if row["source_sha256"] not in hashes and (hashes or not _is_same(tar.tar, row))
        }
        kept = set() if with_kept or url in digests else seen.find_kept(tar.tar)
        if others and all(row["source_sha256"] in kept for row in others.values()):
            num_kept += 1
            continue
        # The parts of a renewed tar must agree, so that its SHA-256 is asked for in any case.
        is_told = hashes or (tar.tar.num_parts == 1 and _differs(tar, url in heads))
        if others and not is_told:
            suspects.append(tar.tar)
        elif others:
            sha256 = next(iter(hashes)) if len(hashes) == 1 else None
            changed |= dict.fromkeys((*others, *tar.list_missing()), sha256)
        elif tar.is_half_renewed:
            sha256 = next(iter(tar.rows.values()))["source_sha256"]
            changed |= dict.fromkeys(tar.list_missing(), sha256)
    return Changes(changed, tuple(suspects), num_kept)


def _differs(tar: KnownTar, has_other_head: bool) -> bool:
    return has_other_head or any(row["tar_bytes"] != tar.tar.num_bytes for row in tar.rows.values())


def _is_same(tar: Task, row: Row) -> bool:
    """Return whether the listing tells the same of a tar as when it was encoded.

    The strongest mark that both times have decides: ETags of equal content are equal, whatever the
    time of a copy. Without any in common the size is all there is.
    """
    if row["tar_bytes"] != tar.num_bytes:
        return False
    for name in ("version", "etag", "mtime"):
        mark = getattr(tar.marks, name)
        if mark is not None and row[name] is not None:
            return bool(mark == row[name])
    return tar.marks == NO_MARKS


def _needs_head(tar: KnownTar, seen: SeenTars) -> bool:
    """Return whether a tar's record has no marks, nor was given the first ones that were seen."""
    row = next(iter(tar.rows.values()))
    return (
        all(row[name] is None for name in Marks.model_fields)
        and tar.tar.marks != NO_MARKS
        and row["tar_bytes"] == tar.tar.num_bytes
        and tar.tar.url not in seen.tar_ids
    )


def _read_heads(tars: Sequence[KnownTar], seen: SeenTars) -> set[str]:
    """Keep the marks of the tars whose first bytes agree; return the URLs of the others."""
    others: set[str] = set()
    for start in range(0, len(tars), _AT_ONCE):
        some = tars[start : start + _AT_ONCE]
        (heads,) = read_many(lambda tar: digest_head(tar.tar), some, at_once=len(some))
        agreeing = []
        for tar, head in zip(some, heads, strict=True):
            for row in tar.rows.values():
                if row["head_sha256"] == head:
                    agreeing.append((tar.tar, row["source_sha256"]))
                else:
                    others.add(tar.tar.url)
        seen.add(agreeing)
    return others
