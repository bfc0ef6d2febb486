"""Evaluating a checkpoint on a store: the head's row, and the two that need no head.

Data flow: a checkpoint and a store -> the snapshot that is read, the training run's own where the
store holds it -> what to score, which any process can open -> here, or on workers of Ray: sums over
fixed batches, added up -> rows.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from models.heads.head import Head
from pipeline.base.progress import Progress
from pipeline.base.yaml import SpecError
from pipeline.evaluate.pair_scorer import ROWS, PairScorer, Scoring
from pipeline.evaluate.scoring import ScoredRow
from pipeline.evaluate.workers import count_on_workers
from pipeline.read.choice import PairChoice
from pipeline.read.source import open_layers
from pipeline.runs.checkpoint import CheckpointRecord, load_checkpoint
from pipeline.runs.config import DataConfig
from pipeline.store.snapshot import Snapshot, read_snapshot, take_snapshot
from pipeline.store.store import Store

logger = logging.getLogger(__name__)

NEWEST = "newest"  # as --snapshot: what is committed now


def run_evaluate(
    store_url: str,
    checkpoint: Path,
    *,
    tasks: str | None = None,
    batch: int = 32,
    limit: int | None = None,
    snapshot: str | None = None,
    num_workers: int = 1,
) -> list[ScoredRow]:
    """Score a checkpoint on the pairs of some tasks, by default its config's validation pairs.

    ``limit`` takes a fixed random subset. The phrases' mean masks come from the config's training
    pairs, in the same store. With ``tasks`` every pair of them counts, whatever the config's
    filter. ``snapshot`` is as of ``choose_snapshot``; the rows name the one that was read. One
    worker scores in this process; more are Ray's, on the cluster at ``RAY_ADDRESS`` or here. The
    figures depend on ``batch``, but not on the workers.

    Raises:
        SpecError: no checkpoint, or the store holds no such pairs.
        ValueError: the cluster has fewer GPUs than workers.
    """
    head, record = load_checkpoint(checkpoint)
    scoring = prepare_scoring(
        head, record, store_url, tasks=tasks, batch=batch, limit=limit, snapshot=snapshot
    )
    scorer = _open_scorer(scoring, head, pinned=snapshot != NEWEST)
    num = len(scorer.numbers)
    with Progress("evaluate", total=num, unit="pairs", metrics_path=None) as progress:
        if num_workers == 1:
            counted = scorer.count(None, on_batch=progress.update)
        else:
            counted = count_on_workers(
                scoring, head, num, num_workers=num_workers, on_pairs=progress.update
            )
    names = [(head.name, False), *((name, True) for name in ROWS)]
    return [
        ScoredRow(name, metrics.compute(), baseline, scoring.source.snapshot.digest)
        for (name, baseline), metrics in zip(names, counted, strict=True)
    ]


def _open_scorer(scoring: Scoring, head: Head, *, pinned: bool) -> PairScorer:
    """Open it; where tasks were committed after a pinned snapshot, say how to reach them."""
    try:
        return PairScorer(scoring, head)
    except SpecError as error:
        if not pinned:
            raise
        raise SpecError(
            f"{error}; read was snapshot {scoring.source.snapshot.digest}, --snapshot {NEWEST} "
            "takes what is committed now"
        ) from error


def prepare_scoring(
    head: Head,
    record: CheckpointRecord,
    store_url: str,
    *,
    tasks: str | None,
    batch: int,
    limit: int | None,
    snapshot: str | None,
) -> Scoring:
    """Return what to score a checkpoint on: pairs of its layers, as ``choose_snapshot`` says.

    Raises:
        SpecError: the store lacks a layer or the snapshot.
    """
    store = Store.open(store_url)
    layers = [layer.folder for layer in (record.latents, record.features) if layer is not None]
    source = open_layers(
        store,
        latents=record.latents.folder,
        features=record.features.folder if record.features else None,
        reads_features=record.features is not None,
        snapshot=choose_snapshot(store, record, snapshot, layers),
    )
    data = record.train.data if record.train else DataConfig()
    return Scoring(
        source=source,
        data=data,
        tasks=tasks or data.validation,
        choice=PairChoice() if tasks else data.validation_filter,
        blocks=_list_blocks(record) if "features" in head.inputs else (),
        batch=batch,
        limit=limit,
    )


def choose_snapshot(
    store: Store, record: CheckpointRecord, asked: str | None, folders: Sequence[str]
) -> Snapshot:
    """Return the commits to score on: those asked for, else the run's own, else the newest.

    The run's own, so that checkpoints of a store that grows are scored on the same pairs. The
    newest where the head was converted, or trained on another store.

    Args:
        asked: A snapshot's digest, ``NEWEST``, or None.
        folders: The layers that are read.

    Raises:
        SpecError: the store does not hold the one asked for, or that lacks a layer.
    """
    if asked is None:
        asked, of_run = NEWEST, record.snapshot
        if of_run is not None and store.storage.exists(f"snapshots/{of_run}.json"):
            asked = of_run
        elif of_run is not None:
            logger.warning(
                "%s: does not hold snapshot %s, on which the head was trained; scoring on what is "
                "committed now",
                store.storage.url,
                of_run,
            )
    if asked == NEWEST:
        return take_snapshot(store, folders)
    snapshot = read_snapshot(store, asked)
    snapshot.require(
        folders,
        option="--snapshot",
        reader="the checkpoint's head",
        other=f", or give --snapshot {NEWEST}",
    )
    return snapshot


def _list_blocks(record: CheckpointRecord) -> tuple[int, ...]:
    if record.train is not None:
        return record.train.head.blocks
    assert record.features is not None  # made for the head when it was converted
    return record.features.features.blocks


def format_rows(rows: Sequence[ScoredRow]) -> str:
    """Return a table in percent, as the paper's tables are, and the snapshot that was read."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}   mIoU  IoU_FG      AP   pairs"]
    for row in rows:
        s = row.scores
        lines.append(
            f"{row.name:{width}}  {100 * s.mIoU:5.1f}  {100 * s.IoU_FG:6.1f}  {100 * s.AP:6.1f}"
            f"  {s.num_pairs:6d}"
        )
    lines += [
        f"snapshot {digest}" for digest in sorted({row.snapshot or "" for row in rows} - {""})
    ]
    return "\n".join(lines)
