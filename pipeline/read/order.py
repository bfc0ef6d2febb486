"""The order of an epoch: a pseudorandom permutation computed a position at a time.

A Feistel network over the smallest even number of bits that holds the pairs, walked until it lands
inside (Black and Rogaway, 2002, cycle walking). Memory and start-up do not grow with the corpus,
and the order is a pure function of (seed, epoch, number of pairs), whoever asks.

``WindowedOrder`` is for object stores: whole runs of neighbours are shuffled, and the pairs of some
runs at a time among themselves, so that a run is read by a few requests. It too is a pure function,
and the state of either is a position.
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

MAX_RUN = 4096
"""Samples of a run of a windowed order, at most: what a task has more is another run."""

_NUM_ROUNDS = 6
_DRAWS = -1  # the part of an epoch's permutations that is for draws; windows count from 1


def shuffle_positions(
    positions: np.ndarray, *, num: int, seed: int, epoch: int, part: int = 0
) -> np.ndarray:
    """Return which pair, in [0, num), comes at each position of an epoch; int64 (n,).

    Each ``part`` of an epoch is another permutation.
    """
    if len(positions) and not (positions.min() >= 0 and positions.max() < num):
        raise IndexError(f"positions must be in [0, {num}), got up to {positions.max()}")
    half_bits = max(1, ((max(num - 1, 1)).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch, part)
    values = positions.astype(np.uint64)
    values = _permute(values, half_bits, keys)
    while (outside := values >= num).any():
        values[outside] = _permute(values[outside], half_bits, keys)
    return values.astype(np.int64)


def choose_draws(
    samples: np.ndarray, *, num: int, seed: int, epoch: int, draws: Sequence[int]
) -> np.ndarray:
    """Return one of ``draws`` for each of some samples, in [0, num), of an epoch; int64 (n,).

    A second permutation of the epoch's samples, modulo the draws: which draw a sample gets is
    random in every epoch, and all are read equally often.
    """
    places = shuffle_positions(samples, num=num, seed=seed, epoch=epoch, part=_DRAWS)
    return np.asarray(draws, np.int64)[places % len(draws)]


def _round_keys(seed: int, epoch: int, part: int) -> np.ndarray:
    text = f"ldznet\0order\0{seed}\0{epoch}" + (f"\0{part}" if part else "")
    digest = hashlib.sha512(text.encode()).digest()
    return np.frombuffer(digest, dtype="<u8")[:_NUM_ROUNDS]


def _permute(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (mix_bits(right ^ key) & mask)
    return (left << bits) | right


def mix_bits(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class WindowedOrder:
    """Which pair comes at each position where ``window`` runs at a time are shuffled together.

    A run is the pairs [starts[k], starts[k+1]), such as those of a task or of a shard. The order of
    the runs is a shuffle of the epoch; each ``window`` of them in that order is a window, whose
    pairs are shuffled among themselves. With all runs in one window it is a global shuffle.
    Keeps 24 bytes a run; making it shuffles all runs, a second for some million.
    """

    def __init__(self, starts: np.ndarray, *, window: int, seed: int, epoch: int) -> None:
        lengths = np.diff(starts)
        if window < 1 or not len(lengths) or starts[0] != 0 or lengths.min() < 0:
            raise ValueError(
                f"expected run starts from 0, ascending, and a window of at least 1 run, got "
                f"{starts[:5]} … and {window}"
            )
        self._seed, self._epoch = seed, epoch
        runs = np.arange(len(lengths))
        order = shuffle_positions(runs, num=len(lengths), seed=seed, epoch=epoch)
        self._ends = np.cumsum(lengths[order])  # of the runs in their order
        self._shifts = starts[order] - (self._ends - lengths[order])  # from place to pair
        last_runs = np.append(runs[window - 1 : -1 : window], runs[-1])
        self.window_ends = self._ends[last_runs]  # positions where windows end

    def __len__(self) -> int:
        return int(self._ends[-1])

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the pair at each position, int64 (n,); IndexError outside [0, pairs)."""
        if len(positions) and not (positions.min() >= 0 and positions.max() < len(self)):
            raise IndexError(f"positions must be in [0, {len(self)}), got up to {positions.max()}")
        windows = np.searchsorted(self.window_ends, positions, side="right")
        found = np.empty(len(positions), np.int64)
        for window in np.unique(windows).tolist():
            here = windows == window
            first = int(self.window_ends[window - 1]) if window else 0
            found[here] = first + shuffle_positions(
                positions[here] - first,
                num=int(self.window_ends[window]) - first,
                seed=self._seed,
                epoch=self._epoch,
                part=window + 1,
            )
        return found + self._shifts[np.searchsorted(self._ends, found, side="right")]


def cut_runs(starts: np.ndarray, max_pairs: int) -> np.ndarray:
    """Return run starts for ``WindowedOrder``: tasks' starts, and more where a task is longer."""
    parts = [np.arange(a, b, max_pairs) for a, b in pairwise(starts.tolist())]
    return np.concatenate([*parts, starts[-1:]]).astype(np.int64)


def split_batch(step: int, *, num: int, batch: int, rank: int, num_workers: int) -> np.ndarray:
    """Return one worker's positions in the global batch ``step`` of an epoch of ``num`` pairs.

    The global batch is positions [step·batch, (step+1)·batch), cut at the epoch's end; worker
    ``rank`` takes every ``num_workers``-th of them, so that the union and its order do not depend
    on how many workers there are. May be empty in the last batch.
    """
    return np.arange(step * batch + rank, min((step + 1) * batch, num), num_workers)


def count_steps(num: int, batch: int) -> int:
    """Return the global batches in an epoch, the last one perhaps smaller."""
    return -(-num // batch)
