"""Removes what killed writers left and what retired tasks held, and nothing that may be read.

An attempt's name says which generation it would commit. It is an orphan only where the record of
that task and generation exists and names another attempt: then its writer, dead or slow, cannot
commit any more. No clock takes part. Kept are attempts of a generation without a record, whose
writer may be at work, generations that a newer one has replaced, and attempts whose record cannot
be read. An upload to an object store that has not ended is useless by the same rule, also below the
attempt that won: that one's writer ended all that it needed.

The files of a retired task go once no snapshot names it in that layer. First its next record says
so, create-only, so that either this or an ``rm --unretire`` beside it takes place.
"""

import errno
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from pipeline.base.failpoints import pass_step
from pipeline.storage.interface import Upload
from pipeline.store.commit import (
    DamagedStoreError,
    RecordName,
    attempt_generation,
    read_commit,
    write_commit,
)
from pipeline.store.store import Store
from pipeline.upkeep.retired import Retired, find_removable

logger = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"\.(?P<record>.+\.[0-9]{4}\.json)\.[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Orphan:
    """A folder or a file of the store that nothing reads; ``num_bytes`` it holds.

    ``is_retired``: it is a retired task's; ``retired`` is then the layer and the record whose next
    one must say before that its files are removed, None where one does.
    """

    path: str
    num_bytes: int
    is_retired: bool = False
    retired: tuple[str, RecordName] | None = None


def list_orphans(store: Store) -> Iterator[Orphan]:
    """Yield every orphan of every layer.

    Raises:
        SpecError: there is no store.
        DamagedStoreError: a layer's spec cannot be read.
    """
    layers = [layer.folder for layer in store.list_layers(required=True)]
    retired = find_removable(store, layers)
    for layer in layers:
        yield from _list_attempts(store, layer, retired[layer])
        yield from _list_temporaries(store, layer)


def _list_attempts(store: Store, layer: str, retired: Mapping[str, Retired]) -> Iterator[Orphan]:
    storage = store.storage
    for task in storage.list_names(f"{layer}/data"):
        attempts = sorted(storage.list_names(f"{layer}/data/{task}"))
        gone = retired.get(task)
        if gone is None and len(attempts) < 2:
            continue  # alone it is the committed one, or its writer may be at work
        for attempt in attempts:
            folder = f"{layer}/data/{task}/{attempt}"
            is_retired, record = gone is not None and gone.holds(attempt), None
            if gone is not None and is_retired:
                record = (layer, gone.record) if gone.record else None
            elif not _is_useless(store, layer, task, attempt):
                continue
            num_bytes = sum(size for _, size in storage.list_files(folder))
            yield Orphan(folder, num_bytes, is_retired, record)


def _is_useless(store: Store, layer: str, task: str, attempt: str) -> bool:
    """Return whether another attempt than this has become the record that it would make."""
    generation = attempt_generation(attempt)
    if generation is None:
        return False
    return _find_winner(store, layer, RecordName(task, generation)) not in (None, attempt)


def _find_winner(store: Store, layer: str, record: RecordName) -> str | None:
    try:
        return read_commit(store.storage, layer, record).attempt
    except DamagedStoreError as error:
        # A damaged record stays for good, whatever generation follows it: gc must not end here.
        if not isinstance(error.__cause__, FileNotFoundError):
            logger.warning("%s; nothing of this task and generation is removed", error)
        return None


def _list_temporaries(store: Store, layer: str) -> Iterator[Orphan]:
    """Records that were written and never got their name, which another one has by now.

    Those of other files (a layer's spec) stay: only a record's writer takes their loss for what it
    is, a lost race.
    """
    names = set(store.storage.list_names(f"{layer}/commits"))
    for name in sorted(names):
        match = _TEMPORARY.fullmatch(name)
        if match is None or match["record"] not in names:
            continue
        path = f"{layer}/commits/{name}"
        try:
            num_bytes = store.storage.size(path)
        except FileNotFoundError:
            continue  # its writer has removed it meanwhile
        yield Orphan(path, num_bytes)


def remove_orphans(store: Store, orphans: Iterator[Orphan]) -> Iterator[Orphan]:
    """Remove orphans one by one and yield each after it is gone.

    Raises:
        OSError: one cannot be removed.
    """
    for orphan in orphans:
        pass_step("gc.listed")
        if orphan.retired is not None and not _mark_removed(store, *orphan.retired):
            continue  # it was taken back meanwhile
        try:
            store.storage.remove_tree(orphan.path)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            logger.warning("%s: left for a later gc, for it is still used: %s", orphan.path, error)
            continue
        pass_step("gc.removed")
        yield orphan


def _mark_removed(store: Store, layer: str, record: RecordName) -> bool:
    """Write the record that says that a retired task's files are removed; tell whether it is so."""
    removed = read_commit(store.storage, layer, record).restate(
        "removed", generation=record.generation + 1
    )
    return write_commit(store.storage, removed) == "won"


def list_uploads(store: Store) -> Iterator[tuple[Upload, bool]]:
    """Yield every upload that has not ended, and whether it is useless: its record is there.

    Raises, beside those of ``list_orphans``:
        ValueError: S3 without the extra ``s3``.
        OSError: the uploads may not be listed, or the server does not list them.
    """
    for layer in store.list_layers(required=True):
        uploads = store.storage.list_uploads(f"{layer.folder}/data")
        for record, some in groupby(uploads, key=lambda upload: _find_record(upload.path)):
            settled = record is not None and _find_winner(store, layer.folder, record) is not None
            yield from ((upload, settled) for upload in some)


def _find_record(path: str) -> RecordName | None:
    """Return which record the writer of a file of an attempt would make."""
    _, _, task, attempt, *_ = f"{path}//".split("/")
    generation = attempt_generation(attempt)
    return None if generation is None else RecordName(task, generation)
