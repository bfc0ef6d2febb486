"""Retires tasks, so that nothing reads them any more, and takes that back.

Data flow: the tars that the patterns match, by the table of records -> the newest record of each of
their tasks, in the latents layer and in all features layers over it -> the task's next record, a
copy of that one with another status. It is created create-only; where another writer's came first,
that one is copied. No file is touched. A layer that retires comes before those over it, and one
that returns after them, so that whoever reads meanwhile, or after a kill, misses the task as a
whole; a second call does what is left.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fsspec.utils import glob_translate

from pipeline.base.yaml import SpecError
from pipeline.corpus.pattern import MAGIC, expand_braces
from pipeline.store.commit import (
    Commit,
    DamagedStoreError,
    RecordName,
    Status,
    list_generations,
    list_records,
    read_commit,
    write_commit,
)
from pipeline.store.read_many import read_many
from pipeline.store.records import read_rows
from pipeline.store.store import Store
from pipeline.store.task_ids import describe_unmatched, parse_part_id

_AT_ONCE = 1024
_RETIRED = ("retired", "removed")


@dataclass(frozen=True, slots=True)
class FoundTask:
    """A task that patterns match in a layer: its newest record, and what that says.

    ``status`` is None where the record cannot be read, and so are the numbers 0.
    """

    record: RecordName
    status: Status | None
    num_pairs: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class LayerTasks:
    """The tasks of a layer that patterns match: those to be changed, and how many need no change.

    The patterns ask that they be retired, or with ``returns`` that they be so no more.
    """

    layer: str
    returns: bool
    tasks: list[FoundTask] = field(default_factory=list)
    num_done: int = 0


class _TarPatterns:
    """Tells which tars patterns match: by id, URL, path, or the end of a path, its name with it."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._literal: dict[str, str] = {}  # to the pattern that was given
        self._globs = []
        for given in patterns:
            for text in {given, *expand_braces(given)}:
                self._literal[text] = given
                if MAGIC.search(text):
                    self._globs.append((re.compile(glob_translate(text)), given))
                    if "[" in text:  # as in a folder's name, data[v1]
                        literal = glob_translate(text.replace("[", "[[]"))
                        self._globs.append((re.compile(literal), given))

    def find(self, ids: Iterable[str], url: str | None) -> set[str]:
        """Return the patterns that match a tar by the ids of its tasks or by its URL."""
        names = [*ids]
        if url is not None:
            path = url.split("://", 1)[-1]
            parts = path.strip("/").split("/")
            names += [url, path, *("/".join(parts[at:]) for at in range(len(parts)))]
        found = {self._literal[name] for name in names if name in self._literal}
        return found | {given for glob, given in self._globs if any(map(glob.match, names))}


def find_tasks(store: Store, patterns: Sequence[str], *, returns: bool = False) -> list[LayerTasks]:
    """Return what patterns match, a latents layer and those over it at a time, in writing order.

    A glob matches a task's id, or its tar's URL, path or end of a path (so also its name); its
    ``*`` stays within a folder, ``**`` does not. All parts of a tar are matched together.

    Raises:
        SpecError: there is no store; a pattern matches nothing.
        OSError: the storage fails or denies access.
    """
    matcher, unmatched, found = _TarPatterns(patterns), set(patterns), []
    held: dict[str, None] = {}
    layers = store.list_layers(required=True)
    for latents in (layer.folder for layer in layers if layer.kind == "latents"):
        tasks = []
        for ids, url in _list_tars(store, latents).values():
            held |= dict.fromkeys(ids)
            if matched := matcher.find([*ids, *_list_tar_ids(ids)], url):
                unmatched -= matched
                tasks += ids
        features = [layer for layer in layers if layer.kind == "features"]
        over = [layer.folder for layer in features if layer.latents_folder == latents]
        folders = [*over, latents] if returns else [latents, *over]
        found += [_list_tasks(store, folder, tasks, returns) for folder in folders if tasks]
    if unmatched:
        url, ids = store.storage.url, sorted(held)
        said = describe_unmatched("--task", sorted(unmatched), url, ids, by_id=False)
        raise SpecError(
            f"{said}. None is of a tar with such a URL, path or name either; nothing was changed"
        )
    return found


def _list_tars(store: Store, layer: str) -> dict[str, tuple[list[str], str | None]]:
    """Return the tars of a latents layer by id: their tasks, and the URL if a record tells it."""
    generations = list_generations(store.storage, layer)
    records = [RecordName(task, number) for task in generations for number in generations[task]]
    tars: dict[str, tuple[list[str], str | None]] = {}
    urls = _read_rows(store, layer, records, "url")
    for record, (url,) in zip(records, urls, strict=True):
        tar_id = next(iter(_list_tar_ids([record.task])), record.task)
        ids, known = tars.get(tar_id, ([], None))
        tars[tar_id] = list(dict.fromkeys([*ids, record.task])), url or known
    return tars


def _list_tar_ids(ids: Iterable[str]) -> set[str]:
    return {found[0] for task in ids if (found := parse_part_id(task))}


def _list_tasks(store: Store, layer: str, tasks: Iterable[str], returns: bool) -> LayerTasks:
    """Return those of some tasks that a layer has."""
    newest = list_records(store.storage, layer)
    records = [newest[task] for task in sorted(tasks) if task in newest]
    found = LayerTasks(layer, returns)
    rows = _read_rows(store, layer, records, "status", "pairs", "num_bytes")
    num_done = 0
    for record, (status, pairs, num_bytes) in zip(records, rows, strict=True):
        if status is not None and (status in _RETIRED) != returns:
            num_done += 1
        else:
            found.tasks.append(FoundTask(record, status, pairs or 0, num_bytes or 0))
    return LayerTasks(layer, returns, found.tasks, num_done)


def _read_rows(
    store: Store, layer: str, records: Sequence[RecordName], *columns: str
) -> Iterable[tuple[Any, ...]]:
    """Return what the table of records says of some; None where one cannot be read."""
    rows = read_rows(store, layer, records, columns)
    return zip(*(rows[name].to_pylist() for name in columns), strict=True)


def change_tasks(store: Store, found: LayerTasks) -> Iterator[list[Status | None]]:
    """Retire a layer's tasks or take that back; yield what they are now, as they are done.

    None is one that needed no change by then. Of one whose newest record cannot be read the one
    before is taken.

    Raises:
        DamagedStoreError: no record of a task can be read.
        OSError: the storage fails; what was done stays.
    """

    def change(task: FoundTask) -> Status | None:
        return _change_task(store, found.layer, task.record, returns=found.returns)

    yield from read_many(change, found.tasks, at_once=_AT_ONCE)


def _change_task(store: Store, layer: str, newest: RecordName, *, returns: bool) -> Status | None:
    task, generation = newest
    while True:
        commit = _read_sound(store, layer, RecordName(task, generation))
        status = _choose_status(store, commit, returns=returns)
        if status is None and (returns or commit.generation == generation):
            return None
        made = commit.restate(status or commit.status, generation=generation + 1)
        if write_commit(store.storage, made) == "won":
            return made.status
        generation += 1  # another writer's came first: an encode, a gc or another rm


def _read_sound(store: Store, layer: str, newest: RecordName) -> Commit:
    """Return the last record of a task that can be read."""
    try:
        return read_commit(store.storage, layer, newest)
    except DamagedStoreError:
        for generation in reversed(range(newest.generation)):
            try:
                return read_commit(store.storage, layer, RecordName(newest.task, generation))
            except DamagedStoreError:
                continue
        raise


def _choose_status(store: Store, commit: Commit, *, returns: bool) -> Status | None:
    """Return what a task becomes, None where it is that already."""
    if not returns:
        changes: dict[Status, Status] = {"stored": "retired", "vacant": "removed"}
        return changes.get(commit.status)
    if commit.status not in _RETIRED:
        return None
    there = dict(store.storage.list_files(commit.data_folder))
    wanted = {f"{commit.layer}/{file.path}": file.num_bytes for file in commit.files}
    is_there = commit.status == "retired" and wanted.items() <= there.items()
    return "stored" if is_there else "vacant"
