"""Evaluating a checkpoint on a store: a row of scores for its head and one for each baseline.

Data flow: a checkpoint and a store -> the snapshot to read, by default the training run's own -> a
scoring job -> sums over fixed batches, computed here or on Ray workers and added up -> rows.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from models.heads.head import Head
from models.heads.metrics import SegmentationMetrics
from pipeline.base.progress import Progress
from pipeline.base.yaml import SpecError
from pipeline.evaluate.baselines import BASELINES
from pipeline.evaluate.pair_scorer import PairScorer, ScoringJob
from pipeline.evaluate.phrasecut import Annotations, format_official_rows, list_official_figures
from pipeline.evaluate.scoring import BATCH_SIZE, ScoredRow, list_false_answers
from pipeline.evaluate.workers import count_on_workers
from pipeline.read.choice import PairChoice
from pipeline.read.source import Source, choose_layers
from pipeline.runs.checkpoint import LDM_FOLDER, CheckpointRecord, load_checkpoint
from pipeline.runs.config import DataConfig
from pipeline.spec.layer import LayerSpec
from pipeline.store.snapshot import Snapshot, create_snapshot, read_snapshot, take_repairs
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
    negatives: bool = False,
    layer: str | None = None,
    annotations: Path | None = None,
) -> list[ScoredRow]:
    """Score a checkpoint on the pairs of some tasks, by default its config's validation pairs.

    The baselines' mean masks are of the config's training pairs, in the same layer; where it has
    none, their row is left out. One worker scores in this process; several run on Ray, at
    ``RAY_ADDRESS`` or here, with the same figures.

    Args:
        tasks: Glob over task ids; all their pairs are scored, whatever the config's filter.
        batch_size: Pairs computed together; changes the last digits of the figures.
        limit: Score a fixed random choice of so many pairs; None: all.
        snapshot: As of ``choose_snapshot``; the rows name the one that was read.
        negatives: Score the negative pairs too, at most ``limit``, as if the config asked for it.
        layer: As of ``choose_scored_layers``.
        annotations: PhraseCut's ``refer_<split>.json``, for its evaluator's figures too.

    Raises:
        SpecError: there is no checkpoint, or the store holds no such pairs.
        ValueError: the cluster has fewer GPUs than workers.
    """
    head, record = load_checkpoint(checkpoint)
    job = build_scoring_job(
        record,
        store_url,
        tasks=tasks,
        batch_size=batch_size,
        limit=limit,
        snapshot=snapshot,
        layer=layer,
        out=checkpoint,
    )
    if annotations is not None and limit is not None:
        raise SpecError("--protocol phrasecut scores a whole split: leave --limit out")
    official = None if annotations is None else Annotations.read(annotations)
    if record.converted is not None and (checkpoint / LDM_FOLDER).is_dir():
        job = replace(job, model=str(checkpoint / LDM_FOLDER))
    negatives = negatives or bool(record.train and record.train.negatives)
    jobs = [replace(job, annotations=official)]
    jobs += [replace(job, negatives=True)] if negatives else []
    try:
        scorers = [PairScorer(each, head) for each in jobs]
    except SpecError as error:
        advice, digest = (
            "" if tasks else "; --tasks names what is scored",
            job.source.snapshot.digest,
        )
        if snapshot != NEWEST and digest in (snapshot, record.snapshot):  # later ones may be there
            advice += (
                f"; read was snapshot {digest}, --snapshot {NEWEST} takes what is committed now"
            )
        raise SpecError(f"{error}{advice}") from error
    scorers[0].reader.warn_of_maskless(f"tasks {job.tasks!r}")
    counted = [
        _count(each, head, scorer, num_workers) for each, scorer in zip(jobs, scorers, strict=True)
    ]
    return list(_build_rows(jobs[0], scorers[0].names, *counted))


def _build_rows(
    job: ScoringJob,
    names: Sequence[str],
    counted: Sequence[SegmentationMetrics],
    negatives: Sequence[SegmentationMetrics] = (),
) -> Iterator[ScoredRow]:
    for place, name in enumerate(names):
        scores = counted[place].compute()
        false = list_false_answers(negatives[place], scores) if negatives else {}
        official: Mapping[str, float] = {}
        if job.annotations is not None:
            whole = counted[len(names) + place]
            official = list_official_figures(whole, len(job.annotations.spans))
        digest = job.source.snapshot.digest
        yield ScoredRow(name, scores, name in BASELINES, digest, false, official)


def _count(
    job: ScoringJob, head: Head, scorer: PairScorer, num_workers: int
) -> list[SegmentationMetrics]:
    num, verb = len(scorer.numbers), "evaluate negatives" if job.negatives else "evaluate"
    with Progress(verb, total=num, unit="pairs", metrics_path=None) as progress:
        if num_workers == 1:
            return scorer.count(None, on_batch=progress.update)
        return count_on_workers(job, head, num, num_workers=num_workers, on_pairs=progress.update)


def build_scoring_job(
    record: CheckpointRecord,
    store_url: str,
    *,
    tasks: str | None,
    batch_size: int,
    limit: int | None,
    snapshot: str | None,
    layer: str | None = None,
    out: Path | None = None,
) -> ScoringJob:
    """Return the job of ``run_evaluate``; SpecError where the store lacks layer or snapshot."""
    store = Store.open(store_url)
    layers = choose_scored_layers(store, record, layer)
    source = Source(store, *layers, choose_snapshot(store, record, snapshot, layers, out=out))
    data = record.train.data if record.train else DataConfig()
    own = record.features or record.latents
    if own.folder not in source.folders:
        data = data.model_copy(update={"draws": None})  # they number the other layer's
    return ScoringJob(
        source=source,
        data=data,
        tasks=tasks or data.validation,
        option="--tasks" if tasks else "data.validation",
        choice=PairChoice() if tasks else data.validation_filter,
        batch_size=batch_size,
        limit=limit,
        model=record.train.head.model if record.train else None,
    )


def choose_scored_layers(
    store: Store, record: CheckpointRecord, name: str | None
) -> tuple[LayerSpec, LayerSpec | None]:
    """Return the layers to score on: those that the head was trained on, or others of its model.

    Others have other views, prompts or timesteps: a test is not cut as the training was. ``name``
    is the folder or fingerprint of one of the kind that the head was trained on. Without it they
    are the head's own where the store has them, else the only ones that fit.

    Raises:
        SpecError: none fits, or they are of another model.
    """
    own = record.features or record.latents
    if name is None and store.storage.exists(f"{own.folder}/spec.json"):
        name = own.folder
    by_kind = {"latents": None, "features": None} | {own.kind: name}
    layers = choose_layers(store, **by_kind, reads_features=record.features is not None)
    for layer, of_head in zip(layers, (record.latents, record.features), strict=True):
        if layer is None or of_head is None or layer.folder == of_head.folder:
            continue  # one layer has other splits and another place of its model in each store
        if layer.canonical["weights"] != of_head.canonical["weights"]:
            raise SpecError(
                f"{layer.folder}: expected a layer of the model that the head was trained with, "
                f"{of_head.source['model']}, got other weights, from {layer.source['model']}"
            )
        logger.warning("scoring on %s; the head was trained on %s", layer.folder, of_head.folder)
    return layers


def choose_snapshot(
    store: Store,
    record: CheckpointRecord,
    asked: str | None,
    layers: Sequence[LayerSpec | None],
    *,
    out: Path | None = None,
) -> Snapshot:
    """Return the snapshot to score on: the one asked for, else the run's own, else the newest.

    The default is the run's own, so that a run's checkpoints are scored on the same pairs though
    the store grows. If the head was converted or trained on another store or layer, it is the
    newest.

    ``asked`` is a snapshot's digest, ``NEWEST``, or None for the default; ``out`` the checkpoint,
    beside which its run may have kept the snapshot.

    Raises:
        SpecError: the store does not hold that snapshot, or it lacks a layer.
    """
    folders = [layer.folder for layer in layers if layer is not None]
    snapshot = None
    if asked is None:
        trained = [x.folder for x in (record.latents, record.features) if x is not None]
        asked, of_run = NEWEST, record.snapshot if folders == trained else None
        if of_run is not None:
            try:
                snapshot = read_snapshot(store, of_run, out=out)
            except SpecError as error:
                logger.warning(
                    "%s; the head was trained on it, and is scored on what is committed now", error
                )
    if snapshot is None and asked == NEWEST:
        return create_snapshot(store, folders, write=False)
    snapshot = snapshot or read_snapshot(store, asked, out=out)
    snapshot.require(
        folders,
        option="--snapshot",
        reader="the checkpoint's head",
        other=f", or give --snapshot {NEWEST}",
    )
    return take_repairs(store, snapshot, folders)


def format_rows(rows: Sequence[ScoredRow]) -> str:
    """Return a table in percent, as in the paper, and below it the snapshot that was read."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}    mIoU  threshold  IoU_FG      AP  AP_clipseg   pairs"]
    for row in rows:
        found = row.scores
        lines.append(
            f"{row.name:{width}}  {100 * found.mIoU:6.1f}  {found.mIoU_threshold:9.2f}  "
            f"{100 * found.IoU_FG:6.1f}  {100 * found.AP:6.1f}  {100 * found.AP_clipseg:10.1f}  "
            f"{found.num_pairs:6d}"
        )
    lines.append("threshold: mIoU's best; AP: average precision; AP_clipseg: as the paper's AP")
    for row in rows:
        if row.negatives:
            lines.append(
                f"{row.name:{width}}  false answers, any pixel over 0.5: "
                f"{100 * row.negatives['false_answers']:.1f}, over mIoU's best threshold "
                f"{row.scores.mIoU_threshold:.2f}: {100 * row.negatives['false_answers_best']:.1f}"
                f", of {row.negatives['num_negatives']} negatives"
            )
    official = {row.name: row.official for row in rows if row.official}
    lines += format_official_rows(official, width) if official else []
    lines += sorted({f"snapshot {row.snapshot}" for row in rows if row.snapshot})
    return "\n".join(lines)
