"""Which samples a worker reads in a step: pure functions of (seed, step), worker and passes.

Data flow: step -> the epoch's global batch, positions in its order -> this worker's share of them,
every n-th -> its passes -> the samples at those positions, and a stored draw of each. The union of
the workers' shares, and so every gradient, is the same however many workers and passes there are.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.base.lru_cache import LruCache
from pipeline.read.order import (
    MAX_RUN,
    WindowedOrder,
    choose_draws,
    count_steps,
    cut_runs,
    shuffle_positions,
    split_batch,
)

_EPOCHS = 2  # windowed orders kept: read-ahead crosses from an epoch into the next


@dataclass(frozen=True, slots=True)
class StepShare:
    """One worker's part of a global batch."""

    epoch: int
    num_global: int  # samples of the batch over all workers
    parts: tuple[np.ndarray, ...]  # positions in the epoch's order, int64: one a pass, not empty


class TrainOrder:
    """The samples of every step of one worker.

    ``starts`` are the numbers of the tasks' first samples, and the samples in all. ``window`` is
    how many runs, tasks or parts of ``max_run`` samples of long ones, are shuffled together; None
    shuffles all samples.
    """

    def __init__(
        self,
        starts: np.ndarray,
        *,
        batch_size: int,
        accumulate: int,
        seed: int,
        window: int | None,
        max_run: int = MAX_RUN,
        rank: int = 0,
        num_workers: int = 1,
    ) -> None:
        self._starts = starts
        self._runs = starts if window is None else cut_runs(starts, max_run)
        self._batch_size = batch_size
        self._accumulate = accumulate
        self._seed = seed
        self._window = window
        self._rank = rank
        self._num_workers = num_workers
        self._orders: LruCache[int, WindowedOrder] = LruCache(_EPOCHS)

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return int(self._starts[-1])

    @property
    def steps_an_epoch(self) -> int:
        """Steps until every sample was read once; the last one's batch may be smaller."""
        return count_steps(self.num_samples, self._batch_size)

    def split(self, step: int) -> StepShare:
        """Return this worker's part of a step's batch, which may be nothing in a small one."""
        epoch, in_epoch = divmod(step, self.steps_an_epoch)
        num, batch = self.num_samples, self._batch_size
        ours = split_batch(
            in_epoch, num=num, batch=batch, rank=self._rank, num_workers=self._num_workers
        )
        passes = min(self._accumulate, len(ours))
        parts = tuple(np.array_split(ours, passes)) if passes else ()
        return StepShare(epoch, min(batch, num - in_epoch * batch), parts)

    def samples_at(self, positions: np.ndarray, *, epoch: int) -> np.ndarray:
        """Return the samples at some positions of an epoch, int64 (n,). Threads may ask."""
        if self._window is None:
            return shuffle_positions(positions, num=self.num_samples, seed=self._seed, epoch=epoch)
        window = self._window
        order = self._orders.get_or_make(
            epoch, lambda: WindowedOrder(self._runs, window=window, seed=self._seed, epoch=epoch)
        )
        return order.samples_at(positions)

    def choose_draws(
        self, samples: np.ndarray, *, epoch: int, draws: tuple[int, ...]
    ) -> np.ndarray:
        """Return one of ``draws`` for each sample of an epoch, int64 (n,)."""
        return choose_draws(
            samples, num=self.num_samples, seed=self._seed, epoch=epoch, draws=draws
        )
