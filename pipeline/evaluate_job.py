"""Evaluating a checkpoint on a store: the head's row, and the two that need no head."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.checkpoint import CheckpointRecord, load_checkpoint
from pipeline.evaluate import ScoredRow, score_baselines, score_head
from pipeline.order import shuffle_positions
from pipeline.progress import Progress
from pipeline.reader import PairReader, Source
from pipeline.store import Store, take_snapshot
from pipeline.train_config import DataConfig


def run_evaluate(
    store_url: str,
    checkpoint: Path,
    *,
    tasks: str | None = None,
    batch: int = 32,
    limit: int | None = None,
) -> list[ScoredRow]:
    """Score a checkpoint on the pairs of some tasks, by default its config's validation tasks.

    ``limit`` takes a fixed random subset. The phrases' mean masks come from the config's training
    tasks, in the same store.

    Raises:
        SpecError: no checkpoint, or the store holds no such pairs.
    """
    head, record = load_checkpoint(checkpoint)
    store = Store.open(store_url)
    layers = [store.read_layer(record.latents.folder)]
    features = None
    if record.features is not None:
        features = store.read_layer(record.features.folder)
        layers.append(features)
    snapshot = take_snapshot(store, [layer.folder for layer in layers])
    source = Source(store, layers[0], features, snapshot)
    data = record.train.data if record.train else DataConfig()
    blocks = _list_blocks(record) if "features" in head.inputs else ()
    validation = PairReader(
        source, tasks=tasks or data.validation, inputs=head.inputs, blocks=blocks
    )
    train = PairReader(source, tasks=data.train, inputs=frozenset())
    numbers = choose_pairs(len(validation), limit)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Progress("evaluate", total=len(numbers), unit="pairs", metrics_path=None) as progress:
        scores = score_head(
            head.to(device),
            validation,
            numbers,
            device=device,
            batch=batch,
            on_batch=progress.update,
        )
    baselines = score_baselines(train, validation, numbers, batch=batch)
    return [ScoredRow(head.name, scores), *baselines]


def _list_blocks(record: CheckpointRecord) -> tuple[int, ...]:
    if record.train is not None:
        return record.train.head.blocks
    assert record.features is not None  # made for the head when it was converted
    return record.features.features.blocks


def choose_pairs(num: int, limit: int | None) -> np.ndarray:
    """Return the numbers of all pairs, or of a fixed random ``limit`` of them, ascending."""
    if limit is None or limit >= num:
        return np.arange(num)
    return np.sort(shuffle_positions(np.arange(limit), num=num, seed=0, epoch=0))


def format_rows(rows: Sequence[ScoredRow]) -> str:
    """Return a table in percent, as the paper's tables are."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}   mIoU  IoU_FG      AP   pairs"]
    for row in rows:
        s = row.scores
        lines.append(
            f"{row.name:{width}}  {100 * s.mIoU:5.1f}  {100 * s.IoU_FG:6.1f}  {100 * s.AP:6.1f}"
            f"  {s.num_pairs:6d}"
        )
    return "\n".join(lines)
