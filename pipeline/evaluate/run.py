"""Evaluating a checkpoint on a store: a row of scores for its head and one for each baseline.

Data flow: a checkpoint and a store -> the snapshot to read, by default the training run's own -> a
scoring job -> sums over fixed batches, computed here or on Ray workers and added up -> rows.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.base.progress import Progress
from pipeline.base.yaml import SpecError
from pipeline.evaluate.baselines import BASELINES
from pipeline.evaluate.pair_scorer import PairScorer, ScoringJob
from pipeline.evaluate.scoring import BATCH_SIZE, METRIC_NAMES, ScoredRow
from pipeline.evaluate.workers import count_on_workers
from pipeline.read.choice import PairChoice
from pipeline.runs.checkpoint import CheckpointRecord, load_checkpoint
from pipeline.runs.config import DataConfig
from pipeline.store.snapshot import Snapshot, create_snapshot, read_snapshot
from pipeline.store.store import Store

logger = logging.getLogger(__name__)

NEWEST = "newest"  # as --snapshot: all that is committed now


def run_evaluate(
    store_url: str,
    checkpoint: Path,
    *,
    tasks: str | None = None,
    batch_size: int = BATCH_SIZE,
    limit: int | None = None,
    snapshot: str | None = None,
    num_workers: int = 1,
) -> list[ScoredRow]:
    """Score a checkpoint on the pairs of some tasks, by default its config's validation pairs.

    The baselines' mean masks are of the config's training pairs, in the same store. One worker
    scores in this process; several run on Ray, at ``RAY_ADDRESS`` or here, with the same figures.

    Args:
        tasks: Glob over task ids; all their pairs are scored, whatever the config's filter.
        batch_size: Pairs computed together; changes the last digits of the figures.
        limit: Score a fixed random choice of so many pairs; None: all.
        snapshot: As of ``choose_snapshot``; the rows name the one that was read.

    Raises:
        SpecError: there is no checkpoint, or the store holds no such pairs.
        ValueError: the cluster has fewer GPUs than workers.
    """
    head, record = load_checkpoint(checkpoint)
    job = build_scoring_job(
        record, store_url, tasks=tasks, batch_size=batch_size, limit=limit, snapshot=snapshot
    )
    try:
        scorer = PairScorer(job, head)
    except SpecError as error:
        if snapshot == NEWEST:
            raise
        raise SpecError(  # tasks may have been committed after the snapshot
            f"{error}; read was snapshot {job.source.snapshot.digest}, --snapshot {NEWEST} "
            "takes what is committed now"
        ) from error
    num = len(scorer.numbers)
    with Progress("evaluate", total=num, unit="pairs", metrics_path=None) as progress:
        if num_workers == 1:
            counted = scorer.count(None, on_batch=progress.update)
        else:
            counted = count_on_workers(
                job, head, num, num_workers=num_workers, on_pairs=progress.update
            )
    return [
        ScoredRow(name, metrics.compute(), name in BASELINES, job.source.snapshot.digest)
        for name, metrics in zip((head.name, *BASELINES), counted, strict=True)
    ]


def build_scoring_job(
    record: CheckpointRecord,
    store_url: str,
    *,
    tasks: str | None,
    batch_size: int,
    limit: int | None,
    snapshot: str | None,
) -> ScoringJob:
    """Return the job of ``run_evaluate``; SpecError where the store lacks layer or snapshot."""
    store = Store.open(store_url)
    source = record.open_layers(store, choose_snapshot(store, record, snapshot))
    data = record.train.data if record.train else DataConfig()
    return ScoringJob(
        source=source,
        data=data,
        tasks=tasks or data.validation,
        choice=PairChoice() if tasks else data.validation_filter,
        batch_size=batch_size,
        limit=limit,
    )


def choose_snapshot(store: Store, record: CheckpointRecord, asked: str | None) -> Snapshot:
    """Return the snapshot to score on: the one asked for, else the run's own, else the newest.

    The default is the run's own, so that a run's checkpoints are scored on the same pairs though
    the store grows. If the head was converted or trained on another store, it is the newest.

    ``asked`` is a snapshot's digest, ``NEWEST``, or None for the default.

    Raises:
        SpecError: the store does not hold that snapshot, or it lacks a layer.
    """
    folders = [layer.folder for layer in (record.latents, record.features) if layer is not None]
    if asked is None:
        asked, of_run = NEWEST, record.snapshot
        if of_run is not None and store.storage.exists(f"snapshots/{of_run}.json"):
            asked = of_run
        elif of_run is not None:
            logger.warning(
                "%s: does not hold snapshot %s, on which the head was trained; scoring on what is "
                "committed now",
                *(store.storage.url, of_run),
            )
    if asked == NEWEST:
        return create_snapshot(store, folders, write=False)
    snapshot = read_snapshot(store, asked)
    snapshot.require(
        folders,
        option="--snapshot",
        reader="the checkpoint's head",
        other=f", or give --snapshot {NEWEST}",
    )
    return snapshot


def format_rows(rows: Sequence[ScoredRow]) -> str:
    """Return a table in percent, as in the paper, and below it the snapshot that was read."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  {'  '.join(f'{name:>6}' for name in METRIC_NAMES)}   pairs"]
    for row in rows:
        percent = "  ".join(f"{100 * getattr(row.scores, name):6.1f}" for name in METRIC_NAMES)
        lines.append(f"{row.name:{width}}  {percent}  {row.scores.num_pairs:6d}")
    lines += sorted({f"snapshot {row.snapshot}" for row in rows if row.snapshot})
    return "\n".join(lines)
