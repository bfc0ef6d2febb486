"""Some of a reader's tasks, whole: for estimates whose cost must not grow with the corpus."""

from dataclasses import replace

import numpy as np

from pipeline.order import shuffle_positions
from pipeline.pair_choice import PairChoice
from pipeline.reader import PairReader, Source
from pipeline.store import Snapshot

NUM_TASKS = 256  # some 100,000 pairs: a mean of theirs is within 0.3 % of a standard deviation


def sample_tasks(
    source: Source, reader: PairReader, *, choice: PairChoice, num_tasks: int = NUM_TASKS
) -> PairReader:
    """Return a reader of the masks of a fixed random choice of the tasks that hold pairs.

    ``choice`` is that of ``reader``, which itself comes back where it has no more tasks. Whole
    tasks, since an index is read whole: single pairs of a large corpus would read them all.
    """
    held = np.flatnonzero(np.diff(reader.task_starts))
    if len(held) <= num_tasks:
        return reader
    chosen = held[shuffle_positions(np.arange(num_tasks), num=len(held), seed=0, epoch=0)]
    tasks = reader.tasks  # a tuple of all, made when asked for
    names = {tasks[task] for task in chosen.tolist()}
    folder = source.latents.folder
    records = tuple(r for r in source.snapshot.records[folder] if r.task in names)
    snapshot = Snapshot(source.snapshot.digest, {folder: records})
    part = replace(source, snapshot=snapshot, features=None)
    return PairReader(part, tasks="*", inputs=frozenset(), choice=choice)


def mean_area(reader: PairReader) -> float:
    """Return the mean share of a view that the masks of a reader's pairs cover, in [0, 1]."""
    return float(reader.index["mask_area"].to_numpy().mean(dtype=np.float64))
