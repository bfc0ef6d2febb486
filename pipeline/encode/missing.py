"""What a store still lacks of a corpus, and what of it is damaged: the work of an encode run.

Costs one listing a layer and the inventory of sources; no record is read that an earlier run has
read, so that a run over 100,000 tasks starts as one over 100. A record damaged after that is found
by ``verify``, not here.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.corpus.source import digest_head
from pipeline.corpus.tasks import CorpusError, Task
from pipeline.spec.layer import LayerSpec
from pipeline.stage.work import WorkItem
from pipeline.store.commit import RecordName, list_records
from pipeline.store.records import NUM_READERS, Origin, read_origins
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
    origins, faults = read_origins(store, latents_layer.folder, latents)
    damaged = {(d.layer, d.task, d.generation) for d in damage}
    _warn_of_others(damaged, latents_layer, features_layer, tasks)
    _check_origins(tasks, origins, latents)
    items = []
    for task in tasks:
        there, next_latents = _find(latents_layer, task, latents, damaged)
        over, next_features = (None, 0)
        if features_layer is not None:
            over, next_features = _find(features_layer, task, features, damaged)
        if there is None or (features_layer is not None and over is None):
            fault = faults.get(task.id, "") if there is not None else ""
            items.append(WorkItem(task, there, over, next_latents, next_features, fault))
        elif task.id in faults:
            items.append(WorkItem(task, there, over, fault=faults[task.id]))
    return items


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


def _find(
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


def _check_origins(
    tasks: Sequence[Task], origins: Mapping[str, Origin], latents: Mapping[str, RecordName]
) -> None:
    """Hold tars to what the store has under their ids, and to the ids that it has them under.

    A tar at another URL than when it was committed is known by its head, one ranged read a tar.
    """
    moved = [task for task in tasks if task.id in origins and origins[task.id].url != task.url]
    tars = {task.url: task for task in moved}  # one part of each
    with ThreadPoolExecutor(NUM_READERS) as pool:
        heads = dict(zip(tars, pool.map(digest_head, tars.values()), strict=True))
    for task in moved:
        if origins[task.id].head_sha256 != heads[task.url]:
            raise CorpusError(
                f"corpus: {task.url} has the id {task.id}, which the store holds for another "
                f"tar, {origins[task.id].url}; give --root, a folder above both"
            )
    missing = [task for task in tasks if task.id not in latents]
    held = {origin.url: task for task, origin in origins.items()} if missing else {}
    for task in missing:
        if task.url not in held or task.is_sibling(held[task.url]):
            continue
        raise CorpusError(
            f"corpus: {task.url} would be task {task.id}, but the store holds it as "
            f"{held[task.url]}: ids depend on the folder above the patterns, on the tar's size and "
            "on --split-gb. Give the --root of the first run; for a tar that changed, another store"
        )
