"""Retired tasks whose files may be removed: those that no snapshot of the store names.

Every snapshot is read. One that cannot be read may name any task, so that all files are kept.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.base.yaml import SpecError
from pipeline.store.commit import (
    GONE,
    DamagedStoreError,
    RecordName,
    attempt_generation,
    list_generations,
    read_commit,
)
from pipeline.store.records import read_rows
from pipeline.store.snapshot import list_snapshots, read_snapshot
from pipeline.store.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Retired:
    """A task whose attempts nothing reads up to those of generation ``last``.

    ``record`` is the newest one where it is retired and its files count as there; None where a
    record says already that they are gone. ``first_attempts`` are those whose names tell no
    generation, as the first ldznet named them.
    """

    last: int
    record: RecordName | None
    first_attempts: frozenset[str]

    def holds(self, attempt: str) -> bool:
        """Return whether an attempt is among them."""
        generation = attempt_generation(attempt)
        known = generation is not None and generation <= self.last
        return known or attempt in self.first_attempts


def find_removable(store: Store, layers: Sequence[str]) -> dict[str, dict[str, Retired]]:
    """Return the tasks of layers that were retired and that no snapshot names there, by layer.

    Raises:
        NewerRecordError: a later version of ldznet has written a record.
        OSError: the storage fails or denies access.
    """
    found = {layer: _find_retired(store, layer) for layer in layers}
    if not any(found.values()):
        return found
    num_kept = 0
    for digest in list_snapshots(store):  # after the records: it may name what was retired since
        try:
            snapshot = read_snapshot(store, digest)
        except (DamagedStoreError, SpecError) as error:
            logger.warning(
                "%s; it may name any task, so no retired task's files are removed", error
            )
            return {layer: {} for layer in layers}
        for layer, records in snapshot.records.items():
            for record in records:
                num_kept += found.get(layer, {}).pop(record.task, None) is not None
    if num_kept:
        logger.warning("the files of %d retired tasks stay: snapshots name them", num_kept)
    return found


def _find_retired(store: Store, layer: str) -> dict[str, Retired]:
    """Return the tasks of a layer that are retired, or were and lost their files by it."""
    generations = list_generations(store.storage, layer)
    later = {task: numbers for task, numbers in generations.items() if numbers[-1] > 0}
    records = [RecordName(task, number) for task, numbers in later.items() for number in numbers]
    rows = read_rows(store, layer, records, ("status",))
    status = dict(zip(records, rows["status"].to_pylist(), strict=True))
    found = {}
    for task, numbers in later.items():
        newest = RecordName(task, numbers[-1])
        gone = [number for number in numbers if status[RecordName(task, number)] in GONE]
        is_retired = status[newest] == "retired"
        if is_retired or gone:
            last = newest.generation if is_retired else gone[-1]
            before = [RecordName(task, number) for number in numbers if number <= last]
            first = _list_first_attempts(store, layer, before)
            found[task] = Retired(last, newest if is_retired else None, first)
    return found


def _list_first_attempts(store: Store, layer: str, records: Sequence[RecordName]) -> frozenset[str]:
    """Return the attempts of some records of a task that the first ldznet named."""
    found = set()
    for record in records:
        try:
            attempt = read_commit(store.storage, layer, record).attempt
        except DamagedStoreError:
            continue  # its files stay
        if attempt_generation(attempt) is None:
            found.add(attempt)
    return frozenset(found)
