"""What a store still lacks of a corpus, and what of it is damaged or changed: an encode run's work.

Costs one listing a layer, and reading the store's table of records: records that an earlier run
has read are not read again. A record damaged after that is found by ``verify``, not here.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from pipeline.corpus.known_tars import NO_DIGESTS, Changes, KnownTar, LayerTars, find_changes
from pipeline.corpus.tasks import Task
from pipeline.spec.layer import LayerSpec
from pipeline.stage.work import EncodeConfig, TaskOutcome, WorkItem
from pipeline.store.commit import RecordName, list_records
from pipeline.store.current import LayerRecords, list_current, list_over
from pipeline.store.records import RecordTable, inventory_folder
from pipeline.store.store import Store
from pipeline.upkeep.verify import Damage

logger = logging.getLogger(__name__)
ChangedTars = Literal["fail", "renew", "keep"]
_NOTHING = LayerRecords({}, {})
_HOW_TO_GO_ON = (
    "--changed renew encodes it again, as the task's next generation; --changed keep takes what is "
    "stored for what it is"
)


class FailedTask(NamedTuple):
    """A task that cannot be encoded, and why."""

    task: Task
    outcome: TaskOutcome


@dataclass(frozen=True, slots=True)
class MissingWork:
    """The work of a run, or the tars that must be hashed before it is known.

    ``failed`` are tasks that cannot be encoded. ``num_tasks`` are all tasks of the corpus without
    those that are retired; ``num_kept`` tars changed and were accepted unread; of ``num_empty``
    every sample was rejected; ``num_others`` tasks of the layer are of tars that were not listed.
    """

    items: tuple[WorkItem, ...]
    failed: tuple[FailedTask, ...]
    num_tasks: int
    num_retired: int = 0
    num_kept: int = 0
    num_empty: int = 0
    num_others: int = 0
    suspects: tuple[Task, ...] = ()


class CorpusWork:
    """Compares a corpus with a store, once its tars are listed.

    ``tars`` is None for the tasks that the latents layer has, wherever their tars are now.
    """

    def __init__(
        self,
        store: Store,
        latents_layer: LayerSpec,
        features_layer: LayerSpec | None,
        tars: Sequence[Task] | None,
        *,
        damage: Iterable[Damage] = (),
        changed: ChangedTars = "fail",
    ) -> None:
        self._store = store
        self._latents_layer, self._features_layer = latents_layer, features_layer
        self._policy = changed
        folder = latents_layer.folder
        self._latents = list_current(store, folder)
        self._features = _NOTHING
        if features_layer is not None:
            self._features = list_over(store, features_layer.folder, folder, self._latents.current)
        layer_tars = LayerTars(store, folder, self._latents.newest.values())
        self._faults = layer_tars.faults
        self._has_listing = tars is not None
        if tars is None:
            self._known = layer_tars.list_all()
        else:
            self._known = layer_tars.find(tars, latents_layer.split_bytes)
        self._known = [self._leave_alone(tar) for tar in self._known]
        self._seen = layer_tars.seen
        self._damaged = _list_damaged(store, damage)
        self._warn_of_others()

    def _leave_alone(self, tar: KnownTar) -> KnownTar:
        """Return a tar without its records where it is retired: whether it changed is not asked."""
        return replace(tar, rows={}) if tar.tar.id in self._latents.retired else tar

    def list_missing(
        self,
        digests: Mapping[str, str] = NO_DIGESTS,
        unread: Mapping[str, str] = NO_DIGESTS,
        *,
        rehash: bool = False,
    ) -> MissingWork:
        """Return the tasks of which a layer is not committed, damaged, or of an older content.

        A damaged commit counts as missing while it is the newest of its task; what replaces it is
        the next generation, so that the same report given twice repairs once.

        Args:
            digests: SHA-256 (hex) of the suspects, once they were hashed, by URL.
            unread: error of those that could not be.
            rehash: ask for the digests of all tars that were encoded before.

        Raises:
            OSError: a tar's first bytes could not be read.
        """
        known = [_set_fault(tar, unread) for tar in self._known]
        self._seen.add((tar.tar, digests[tar.tar.url]) for tar in known if tar.tar.url in digests)
        changes = Changes({}, ())
        if self._has_listing:
            renews = self._policy == "renew"
            changes = find_changes(known, self._seen, digests, with_kept=renews)
        changed, suspects, num_kept = changes.changed, changes.suspects, changes.num_kept
        if self._policy == "keep":
            kept = [tar for tar in known if tar.tar in suspects or changed.keys() & tar.rows.keys()]
            rows = ((tar.tar, row["source_sha256"]) for tar in kept for row in tar.rows.values())
            self._seen.add(rows, kept=True)
            changed, suspects, num_kept = {}, (), num_kept + len(kept)
        self._remember_places(known, changed, suspects)
        if rehash and not digests and not unread:
            suspects = tuple(tar.tar for tar in known if tar.rows and not tar.tar.fault)
        self._judge_by_newest(known, changed)
        tasks = [task for tar in known for task in tar.tasks]
        there = [task for task in tasks if task.id not in self._latents.retired]
        work = [] if suspects else [self._find_work(task, changed) for task in there]
        return MissingWork(
            items=tuple(found for found in work if isinstance(found, WorkItem)),
            failed=tuple(found for found in work if isinstance(found, FailedTask)),
            num_tasks=len(there),
            num_retired=len(tasks) - len(there),
            num_kept=num_kept,
            num_empty=sum(tar.is_empty for tar in known) if self._has_listing else 0,
            num_others=len(self._latents.current.keys() - {task.id for task in tasks}),
            suspects=suspects,
        )

    def _judge_by_newest(
        self, known: Sequence[KnownTar], changed: Mapping[str, str | None]
    ) -> None:
        """Take the newest records of the parts of a tar whose other parts are about to be renewed.

        Readers take the content of which most parts are there, which is the older one till then.
        """
        newest = {
            task.id: self._latents.newest[task.id]
            for tar in known
            if self._policy == "renew" and changed.keys() & {task.id for task in tar.tasks}
            for task in tar.tasks
            if task.id not in changed and task.id in self._latents.newest
        }
        if not newest or self._features_layer is None:
            return
        folder, below = self._features_layer.folder, self._latents_layer.folder
        over = list_over(self._store, folder, below, newest).current
        kept = {t: record for t, record in self._features.current.items() if t not in newest}
        self._features = replace(self._features, current=kept | dict(over))
        self._latents = replace(self._latents, current=dict(self._latents.current) | newest)

    def _remember_places(
        self, known: Sequence[KnownTar], changed: Mapping[str, str | None], suspects: Sequence[Task]
    ) -> None:
        """Keep where tars are now that are at another place than when they were encoded."""
        self._seen.add(
            (tar.tar, next(iter(tar.rows.values()))["source_sha256"])
            for tar in known
            if tar.rows
            and not tar.tar.fault
            and tar.tar.url not in self._seen.tar_ids
            and all(row["url"] != tar.tar.url for row in tar.rows.values())
            and not changed.keys() & tar.rows.keys()
            and tar.tar not in suspects
        )

    def _find_work(
        self, task: Task, changed: Mapping[str, str | None]
    ) -> WorkItem | FailedTask | None:
        """Return what a task lacks, or why it cannot be encoded; None where it lacks nothing."""
        there, next_latents = self._find_generations("latents", task)
        over, next_features = self._find_generations("features", task)
        fault = task.fault or (self._faults.get(task.id, "") if there is not None else "")
        if fault:
            return FailedTask(task, TaskOutcome(task.id, "failed", error=fault))
        if task.id in changed and self._policy == "fail":
            error = f"{task.url}: the tar changed since it was encoded; {_HOW_TO_GO_ON}"
            outcome = TaskOutcome(task.id, "failed", error=error, cause="changed")
            return FailedTask(task, outcome)
        if task.id in changed:
            return WorkItem(
                *(task, None, None),
                # A part's is never the first, which a listing cannot tell from the others'.
                next_latents=max(_next_generation(self._latents, task.id), int(task.num_parts > 1)),
                next_features=_next_generation(self._features, task.id),
                renews=True,
                sha256=changed[task.id],
            )
        if there is not None and (self._features_layer is None or over is not None):
            return None
        return WorkItem(task, there, over, next_latents, next_features)

    def _find_generations(self, kind: str, task: Task) -> tuple[int | None, int]:
        """Return the generation that stands, None for none, and the one to write instead."""
        is_latents = kind == "latents"
        records = self._latents if is_latents else self._features
        layer = self._latents_layer if is_latents else self._features_layer
        record = records.current.get(task.id)
        if not is_latents and task.id not in self._latents.newest:
            record = records.newest.get(task.id)  # whose content the latents may turn out to have
        if layer is None or record is None:
            return None, _next_generation(records, task.id)
        if (layer.folder, task.id, record.generation) in self._damaged:
            return None, _next_generation(records, task.id)
        return record.generation, 0

    def _warn_of_others(self) -> None:
        layers = [self._latents_layer, self._features_layer]
        folders = {layer.folder for layer in layers if layer is not None}
        ids = {task.id for tar in self._known for task in tar.tasks}
        others = sorted({d[:2] for d in self._damaged if d[0] not in folders or d[1] not in ids})
        if others:
            layer, task = others[0]
            logger.warning(
                "%d damaged tasks of the report are not of this run's spec and corpus and stay as "
                "they are, such as %s of %s: repair them by the command that encoded them",
                *(len(others), task, layer),
            )


def _set_fault(tar: KnownTar, unread: Mapping[str, str]) -> KnownTar:
    """Return a tar with the error that it could not be hashed for."""
    if tar.tar.url not in unread:
        return tar
    tasks = tuple(replace(task, fault=unread[task.url]) for task in tar.tasks)
    return replace(tar, tasks=tasks)


def _next_generation(records: LayerRecords, task: str) -> int:
    return records.newest[task].generation + 1 if task in records.newest else 0


def update_record_tables(config: EncodeConfig) -> None:
    """Add what a run has committed to its layers' tables of records, which readers start from.

    A table is a cache: where the storage fails now, it is left to the next run.
    """
    store = Store.open(config.store_url)
    for layer in (config.latents, config.features):
        if layer is None:
            continue
        try:
            records: list[RecordName] = list(list_records(store.storage, layer.folder).values())
            RecordTable(store, layer.folder, ()).read(records, faults={})
        except OSError as error:
            logger.info("%s: its table of records is not updated: %s", layer.folder, error)


def _list_damaged(store: Store, damage: Iterable[Damage]) -> set[tuple[str, str, int]]:
    """Return the records of a report's damage; remove a damaged table of records."""
    damaged = set()
    for found in damage:
        if found.path == inventory_folder(found.layer):
            store.storage.remove_tree(found.path)
        else:
            damaged.add((found.layer, found.task, found.generation))
    return damaged
