"""The data loader of a training run: its readers, checked, and batches read ahead by threads.

Data flow: a config and a source -> readers of the training and the validation pairs -> the order of
a worker's pairs -> a pool of threads that read one pass of a step each -> the steps, in order.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from models.heads.registry import find_head_class
from pipeline.base.whole_file import open_whole
from pipeline.base.yaml import SpecError
from pipeline.read.batch import PairBatch
from pipeline.read.reader import PairReader
from pipeline.read.source import Source
from pipeline.read.steps import StepShare, TrainOrder
from pipeline.runs.config import DataConfig, TrainConfig, list_draws

logger = logging.getLogger(__name__)


def open_readers(
    config: TrainConfig, source: Source, *, device: torch.device | None = None
) -> tuple[PairReader, PairReader]:
    """Return the readers of the training and the validation pairs, for batches on ``device``.

    Raises:
        SpecError: the store lacks what the head reads, a split is empty, or the two may overlap.
    """
    data = config.data
    open_reader = _reader_of(config, source, device)
    train = open_reader(
        tasks=data.train, option="data.train", choice=data.train_filter, views=data.views
    )
    validation = open_reader(
        tasks=data.validation,
        option="data.validation",
        choice=data.validation_filter,
        negatives=False,
    )
    shared = sorted(set(train.tasks) & set(validation.tasks))
    if shared and not _keeps_apart(data):
        raise SpecError(
            f"data: {len(shared)} tasks match both train {data.train!r} and validation "
            f"{data.validation!r}, such as {shared[0]}; give globs that do not overlap, or split "
            "the keys by their hash, such as train_filter: {keys_to: 0.9} and validation_filter: "
            "{keys_from: 0.9}"
        )
    list_draws(data, source.features if config.head.blocks else None)
    return train, validation


def _keeps_apart(data: DataConfig) -> bool:
    """Return whether no image can be in both splits, which conditions on keys alone ensure."""
    ours, theirs = data.train_filter, data.validation_filter
    apart = ours.keys_to <= theirs.keys_from or theirs.keys_to <= ours.keys_from
    return apart and ours.keys_seed == theirs.keys_seed


def open_negatives(
    config: TrainConfig, source: Source, *, device: torch.device | None = None
) -> PairReader | None:
    """Return the reader of the negative validation pairs, None where they are not scored.

    Raises:
        SpecError: there are none.
    """
    if not config.negatives:
        return None
    choice = config.data.validation_filter.narrow_to_negatives()
    open_reader = _reader_of(config, source, device)
    return open_reader(tasks=config.data.validation, option="data.validation", choice=choice)


def check_readers(config: TrainConfig, source: Source) -> tuple[PairReader, PairReader]:
    """Open a run's readers once, and log what a careful reader would ask; raises as they do."""
    train, validation = open_readers(config, source)
    train.warn_of_maskless(f"data.train {config.data.train!r}")
    validation.warn_of_maskless(f"data.validation {config.data.validation!r}")
    open_negatives(config, source)
    data, num = config.data, train.num_samples
    shared = [] if _keeps_apart(data) else train.list_shared(validation)
    if shared:
        logger.warning(
            "data: train %r and validation %r both have tars of equal SHA-256 (%d), such as %s and "
            "%s: the head is scored on what it is trained on. Give globs that leave one out, "
            "retire it (ldznet rm STORE --task), or split the keys by their hash (train_filter: "
            "{keys_to: 0.9}, validation_filter: {keys_from: 0.9})",
            *(data.train, data.validation, len(shared), *shared[0]),
        )
    if config.batch_size > num:
        logger.warning(
            "batch_size: %d pairs a step, but data.train %r has %d in an epoch: each step reads "
            "these %d, and is an epoch",
            *(config.batch_size, data.train, num, num),
        )
    return train, validation


def _reader_of(
    config: TrainConfig, source: Source, device: torch.device | None
) -> Callable[..., PairReader]:
    inputs, blocks = find_head_class(config.head.name).reads, config.head.blocks
    model = config.head.model
    return partial(PairReader, source, inputs=inputs, blocks=blocks, device=device, model=model)


def check_batch(config: TrainConfig, *, num_workers: int) -> None:
    """Raise SpecError where a step has no pair for some pass of some worker."""
    least = num_workers * config.accumulate
    if config.batch_size < least:
        raise SpecError(
            f"batch_size: {num_workers} workers with accumulate {config.accumulate} need at least "
            f"{least} pairs a step, got {config.batch_size}; it is over all workers: raise it, or "
            "give fewer --workers or a smaller accumulate"
        )


@dataclass(frozen=True, slots=True)
class Worker:
    """One of the processes that train a head together."""

    rank: int
    num_workers: int
    device: torch.device


ALONE = Worker(0, 1, torch.device("cpu"))
_Reading = Future[tuple[np.ndarray, PairBatch]]  # the numbers of a pass's pairs, and their batch


@dataclass(frozen=True, slots=True)
class StepBatches:
    """A worker's batches of one step."""

    step: int  # from 0
    num_global: int  # pairs of the step over all workers
    passes: tuple[PairBatch, ...]  # one each; empty if a small batch has no pair for this worker


class TrainData:
    """Reads a worker's batches ahead; ``waited_s`` is how long the consumer waited for them."""

    def __init__(
        self,
        config: TrainConfig,
        source: Source,
        reader: PairReader,
        worker: Worker = ALONE,
        *,
        trace: Path | None = None,  # a file to append each step's pairs to
    ) -> None:
        self.order = TrainOrder(
            reader.sample_starts,
            batch_size=config.batch_size,
            accumulate=config.accumulate,
            seed=config.seed,
            window=config.data.window if config.data.order == "windowed" else None,
            rank=worker.rank,
            num_workers=worker.num_workers,
        )
        self.waited_s = 0.0
        self._reader, self._trace = reader, trace
        self._seed, self._num_threads = config.seed, config.loader_workers
        # Passes: those of the next step, and of the one after it.
        self._num_ahead = config.accumulate + max(config.accumulate, config.loader_workers)
        self._draws = list_draws(config.data, source.features if config.head.blocks else None)

    def read_steps(self, first: int, last: int) -> Generator[StepBatches]:
        """Yield the batches of the steps [first, last), in order."""
        with ThreadPoolExecutor(self._num_threads, "load") as pool:
            pending: deque[tuple[int, StepShare, list[_Reading]]] = deque()
            try:
                for step in range(first, last):
                    share = self.order.split(step)
                    while sum(max(1, len(reads)) for *_, reads in pending) >= self._num_ahead:
                        yield self._wait(*pending.popleft())
                    reads = [pool.submit(self._read, share.epoch, part) for part in share.parts]
                    pending.append((step, share, reads))
                while pending:
                    yield self._wait(*pending.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def read_stand_in(self) -> PairBatch:
        """Read one pair, for a worker to which a small batch leaves none."""
        return self._reader.read([0], draws=[self._draws[0]])

    def _wait(self, step: int, share: StepShare, reads: list[_Reading]) -> StepBatches:
        start_s = time.perf_counter()
        found = [future.result() for future in reads]
        self.waited_s += time.perf_counter() - start_s
        if self._trace is not None:
            pairs = [number for numbers, _ in found for number in numbers.tolist()]
            with self._trace.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step + 1, "pairs": pairs}) + "\n")
        return StepBatches(step, share.num_global, tuple(batch for _, batch in found))

    def _read(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, PairBatch]:
        samples = self.order.samples_at(positions, epoch=epoch)
        numbers = self._reader.choose_pairs(samples, seed=self._seed, epoch=epoch)
        draws = self.order.choose_draws(samples, epoch=epoch, draws=self._draws)
        return numbers, self._reader.read(numbers, draws=draws.tolist())


def trace_path(out: Path, rank: int) -> Path:
    """Return the file in which ``trace_pairs`` lists the pairs that a worker reads."""
    return out / f"pairs-{rank}.jsonl"


def trim_traces(out: Path, worker: Worker, *, first_step: int) -> None:
    """Remove the steps after ``first_step`` from the traces of a run that is resumed there.

    The run may have had another number of workers: its files are divided among those of now.
    """
    for path in out.glob("pairs-*.jsonl"):
        number = path.stem.removeprefix("pairs-")
        if not number.isdecimal() or int(number) % worker.num_workers != worker.rank:
            continue
        with path.open("rb") as lines, open_whole(path) as kept:
            for line in lines:
                if not line.endswith(b"\n") or json.loads(line)["step"] > first_step:
                    break  # steps ascend, and a line cut short by a kill is the last
                kept.write(line)
