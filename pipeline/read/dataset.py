"""A reader's samples as a torch Dataset, and a sampler that can be resumed, for loops of one's own.

Data flow: ``EpochSampler`` gives the numbers of a batch -> ``DataLoader`` hands them to a worker
-> ``PairDataset`` there reads them -> a ``PairBatch``, whole::

    source = open_layers("store")  # pipeline.read.source; names a layer where there are several
    reader = PairReader(source, tasks="*train*", inputs=frozenset({"features"}), blocks=(6, 7))
    sampler = EpochSampler(reader, batch_size=32, seed=0)
    dataset = PairDataset(reader, seed=0)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2, collate_fn=keep_batch)
    for batch in loader:  # the rest of the epoch
        ...
        sampler.advance()

A number is ``epoch * num_samples + sample``, so that a worker knows the epoch whose view and draw
it reads. Workers may be forked, also of a process that has read; but of one that has read from an
object store none can read there: give the loader ``multiprocessing_context="spawn"``.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset, Sampler

from pipeline.read.batch import PairBatch
from pipeline.read.order import MAX_RUN, choose_draws, count_steps, split_batch
from pipeline.read.reader import PairReader
from pipeline.read.steps import TrainOrder

logger = logging.getLogger(__name__)


class PairDataset(Dataset[PairBatch | None]):
    """The samples of a reader by number. ``draws`` are those read, by index; None: all stored.

    The draw of a sample is a pure function of (seed, epoch, sample), as its view is. Without
    ``texts`` batches come without keys and phrases: they are read lazily, but a batch on its way to
    another process takes them along, of each of its tasks.
    """

    def __init__(
        self,
        reader: PairReader,
        *,
        seed: int = 0,
        draws: Sequence[int] | None = None,
        texts: bool = True,
    ) -> None:
        self._reader = reader
        self._seed = seed
        self._texts = texts
        self._draws = tuple(range(reader.num_draws) if draws is None else draws)
        if not self._draws or not set(self._draws) <= set(range(reader.num_draws)):
            raise ValueError(f"draws: expected some of 0 to {reader.num_draws - 1}, got {draws}")

    def __len__(self) -> int:
        return self._reader.num_samples

    def __getitem__(self, number: int) -> PairBatch | None:
        """Return a batch of one sample."""
        return self.__getitems__([number])

    def __getitems__(self, numbers: Sequence[int]) -> PairBatch | None:
        """Read the samples of one epoch, None where there are none; raises as ``PairReader``."""
        if not len(numbers):
            return None
        epochs, samples = np.divmod(np.asarray(numbers, np.int64), len(self))
        epoch = int(epochs[0])
        if (epochs != epoch).any():
            raise ValueError(f"expected numbers of epoch {epoch}, got some of {set(epochs)}")
        pairs = self._reader.choose_pairs(samples, seed=self._seed, epoch=epoch)
        draws = choose_draws(
            samples, num=len(self), seed=self._seed, epoch=epoch, draws=self._draws
        )
        return self._reader.read(pairs, draws=draws.tolist(), texts=self._texts)


def keep_batch(batch: PairBatch | None) -> PairBatch | None:
    """Return a batch as it is: the ``collate_fn`` of a loader over a PairDataset."""
    return batch


class EpochSampler(Sampler[list[int]]):
    """One rank's batches of the rest of an epoch, as lists of numbers for a PairDataset.

    ``batch_size`` is that of all ranks together: each takes every ``num_ranks``-th sample of it,
    perhaps none of an epoch's last one. The order of the whole is the same however many ranks there
    are. Iterating changes nothing, for a loader asks ahead: ``advance`` after each batch that was
    used, so that the state says what was.
    """

    def __init__(
        self,
        samples: PairReader | np.ndarray,  # a reader, or its sample_starts alone
        *,
        batch_size: int,
        seed: int = 0,
        order: Literal["global", "windowed"] = "global",
        window: int = 16,  # runs shuffled together
        max_run: int = MAX_RUN,  # samples of a run, which is a task or a part of one
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < num_ranks:
            raise ValueError(
                f"expected a batch of at least 1 and a rank in [0, {num_ranks}), got a batch of "
                f"{batch_size} and rank {rank}"
            )
        starts = samples.sample_starts if isinstance(samples, PairReader) else samples
        self._order = TrainOrder(
            starts,
            batch_size=batch_size,
            accumulate=1,
            seed=seed,
            window=window if order == "windowed" else None,
            max_run=max_run,
            rank=rank,
            num_workers=num_ranks,
        )
        self._num = self._order.num_samples
        of_starts = hashlib.sha256(np.asarray(starts, np.int64).tobytes()).hexdigest()[:16]
        self._told: dict[str, Any] = {  # what a position is of
            "num_samples": self._num,
            "seed": seed,
            "order": order,
            "starts": of_starts,
        }
        if order == "windowed":
            self._told |= {"window": window, "max_run": max_run}
        if isinstance(samples, PairReader):
            self._told["samples"] = samples.digest_samples()
        self._batch_size = batch_size
        self._rank = rank
        self._num_ranks = num_ranks
        self.epoch = 0
        self.position = 0  # samples of the epoch that all ranks together have used

    def __len__(self) -> int:
        return count_steps(self._num - self.position, self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = self.epoch, self.position
        left = self._num - position  # counted from here: it may be inside a batch of this size
        for step in range(count_steps(left, self._batch_size)):
            ours = position + split_batch(
                step, num=left, batch=self._batch_size, rank=self._rank, num_workers=self._num_ranks
            )
            yield (epoch * self._num + self._order.samples_at(ours, epoch=epoch)).tolist()

    def advance(self, num_batches: int = 1) -> None:
        """Count batches as used; after an epoch's last one, smaller or not, the next epoch begins.

        Raises:
            ValueError: less than no batch.
        """
        if num_batches < 0:
            raise ValueError(f"expected a number of batches used from 0, got {num_batches}")
        if num_batches >= len(self) > 0:
            of_later = num_batches - len(self)
            epochs, num_batches = divmod(of_later, self._order.steps_an_epoch)
            self.epoch, self.position = self.epoch + 1 + epochs, 0
        self.position += num_batches * self._batch_size

    def state_dict(self) -> dict[str, Any]:
        """Return the state: epoch, samples of it that were used, and of which samples and order."""
        return {"epoch": self.epoch, "position": self.position, **self._told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a sampler of the same samples, seed and order was, of any ranks and batch.

        Raises:
            ValueError: the epoch has no such position, or it was one of other samples.
        """
        changed = [
            f"{name} was {state[name]}, is {value}"
            for name, value in self._told.items()
            if state.get(name, value) != value
        ]
        if changed:
            raise ValueError(
                f"the state is of other samples or of another order: {'; '.join(changed)}. Read "
                "the snapshot that it was made on, by the same tasks and filters, or start afresh"
            )
        if state["epoch"] < 0 or not 0 <= state["position"] < max(self._num, 1):
            raise ValueError(
                f"expected an epoch from 0 and a position in [0, {self._num}), got {state}; the "
                "state is of other samples"
            )
        if "num_samples" not in state:
            logger.warning("the sampler's state does not tell of which samples it is: %s", state)
        self.epoch, self.position = state["epoch"], state["position"]
