"""What a store still lacks of a corpus, and what of it is damaged: the work of an encode run.

Costs one listing a layer, and reading the store's table of records: records that an earlier run
has read are not read again. A record damaged after that is found by ``verify``, not here.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

from pipeline.corpus.source import digest_head
from pipeline.corpus.tasks import CorpusError, Task
from pipeline.spec.layer import LayerSpec
from pipeline.stage.work import EncodeConfig, WorkItem
from pipeline.store.commit import RecordName, list_records
from pipeline.store.read_many import read_many
from pipeline.store.records import RecordTable, inventory_folder
from pipeline.store.store import Store
from pipeline.upkeep.verify import Damage

logger = logging.getLogger(__name__)


def list_missing(
    store: Store,
    latents_layer: LayerSpec,
    features_layer: LayerSpec | None,
    tasks: Sequence[Task],
    *,
    damage: Iterable[Damage] = (),
) -> list[WorkItem]:
    """Return the tasks of which a layer is not committed, or is damaged.

    ``tasks`` are tars split as the latents layer splits them (``corpus.split_tasks``).

    A damaged commit counts as missing while it is the newest of its task; what replaces it is the
    next generation, so that the same report given twice repairs once. Damage of other layers or
    tasks than the run's is logged.

    Raises:
        CorpusError: a committed task's tar was another one of the same id, or a tar is committed
            under another id or in other parts.
        OSError: the store cannot be listed.
    """
    latents = list_records(store.storage, latents_layer.folder)
    features = list_records(store.storage, features_layer.folder) if features_layer else {}
    damaged = _list_damaged(store, damage)
    _warn_of_others(damaged, latents_layer, features_layer, tasks)
    readable = [task for task in tasks if not task.fault]
    faults = _check_tars(store, latents_layer.folder, readable, latents)
    items = []
    for task in tasks:
        there, next_latents = _find_generations(latents_layer, task, latents, damaged)
        over, next_features = (None, 0)
        if features_layer is not None:
            over, next_features = _find_generations(features_layer, task, features, damaged)
        is_whole = there is not None and (features_layer is None or over is not None)
        fault = task.fault or (faults.get(task.id, "") if there is not None else "")
        if fault or not is_whole:
            items.append(WorkItem(task, there, over, next_latents, next_features, fault))
    return items


def update_record_tables(config: EncodeConfig) -> None:
    """Add what a run has committed to its layers' tables of records, which readers start from.

    A table is a cache: where the storage fails now, it is left to the next run.
    """
    store = Store.open(config.store_url)
    for layer in (config.latents, config.features):
        if layer is None:
            continue
        try:
            records = list_records(store.storage, layer.folder)
            RecordTable(store, layer.folder, ()).read(list(records.values()), faults={})
        except OSError as error:
            logger.info("%s: its table of records is not updated: %s", layer.folder, error)


def _warn_of_others(
    damaged: set[tuple[str, str, int]],
    latents_layer: LayerSpec,
    features_layer: LayerSpec | None,
    tasks: Sequence[Task],
) -> None:
    layers = {layer.folder for layer in (latents_layer, features_layer) if layer is not None}
    ids = {task.id for task in tasks}
    others = sorted({d[:2] for d in damaged if d[0] not in layers or d[1] not in ids})
    if others:
        layer, task = others[0]
        logger.warning(
            "%d damaged tasks of the report are not of this run's spec and corpus and stay as they "
            "are, such as %s of %s: repair them by the command that encoded them",
            len(others),
            task,
            layer,
        )


def _find_generations(
    layer: LayerSpec,
    task: Task,
    records: Mapping[str, RecordName],
    damaged: set[tuple[str, str, int]],
) -> tuple[int | None, int]:
    """Return the generation that stands, None for none, and the one to write instead."""
    record = records.get(task.id)
    if record is None:
        return None, 0
    if (layer.folder, task.id, record.generation) in damaged:
        return None, record.generation + 1
    return record.generation, 0


def _list_damaged(store: Store, damage: Iterable[Damage]) -> set[tuple[str, str, int]]:
    """Return the records of a report's damage; remove a damaged table of records."""
    damaged = set()
    for found in damage:
        if found.path == inventory_folder(found.layer):
            store.storage.remove_tree(found.path)
        else:
            damaged.add((found.layer, found.task, found.generation))
    return damaged


def _check_tars(
    store: Store, layer: str, tasks: Sequence[Task], latents: Mapping[str, RecordName]
) -> dict[str, str]:
    """Check that each tar is what the store has under its id, and is under no other id.

    Returns task → error of the records that cannot be read.
    """
    faults: dict[str, str] = {}
    table = RecordTable(store, layer, ("url", "head_sha256"))
    table.read(list(latents.values()), faults=faults)
    rows = table.select(list(latents.values()))
    urls: dict[str, str] = {}
    for name, url in zip(latents, rows["url"].to_pylist(), strict=True):
        if url is not None:
            urls[name] = url
        elif name not in faults:
            faults[name] = f"{layer}: the record of {name} names no source"
    moved = [task for task in tasks if urls.get(task.id, task.url) != task.url]
    if moved:
        _check_moved(moved, urls, dict(zip(latents, rows["head_sha256"].to_pylist(), strict=True)))
    missing = [task for task in tasks if task.id not in latents]
    held = {url: name for name, url in urls.items()} if missing else {}
    for task in missing:
        if task.url not in held or task.is_sibling(held[task.url]):
            continue
        raise CorpusError(
            f"corpus: {task.url} would be task {task.id}, but the store holds it as "
            f"{held[task.url]}: ids depend on the folder above the patterns, on the tar's size and "
            "on --split-gb. Give the --root of the first run; for a tar that changed, another store"
        )
    return faults


def _check_moved(moved: Sequence[Task], urls: Mapping[str, str], heads: Mapping[str, str]) -> None:
    """Check by its first bytes that a tar at another URL is the one that was committed."""
    tars = list({task.url: task for task in moved}.values())  # one part of each
    (digests,) = read_many(digest_head, tars, at_once=len(tars))
    found = dict(zip((task.url for task in tars), digests, strict=True))
    for task in moved:
        if heads[task.id] != found[task.url]:
            raise CorpusError(
                f"corpus: {task.url} has the id {task.id}, which the store holds for another "
                f"tar, {urls[task.id]}; give --root, a folder above both"
            )
