"""The order of an epoch: a pseudorandom permutation computed a position at a time.

A Feistel network over the smallest even number of bits that holds the pairs, walked until it lands
inside (Black and Rogaway, 2002, cycle walking). Memory and start-up do not grow with the corpus,
and the order is a pure function of (seed, epoch, number of pairs), whoever asks.
"""

import hashlib

import numpy as np

_NUM_ROUNDS = 6


def shuffle_positions(positions: np.ndarray, *, num: int, seed: int, epoch: int) -> np.ndarray:
    """Return which pair, in [0, num), comes at each position of an epoch; int64 (n,)."""
    if len(positions) and not (positions.min() >= 0 and positions.max() < num):
        raise IndexError(f"positions must be in [0, {num}), got up to {positions.max()}")
    half_bits = max(1, ((max(num - 1, 1)).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = positions.astype(np.uint64)
    values = _permute(values, half_bits, keys)
    while (outside := values >= num).any():
        values[outside] = _permute(values[outside], half_bits, keys)
    return values.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.sha512(f"ldznet\0order\0{seed}\0{epoch}".encode()).digest()
    return np.frombuffer(digest, dtype="<u8")[:_NUM_ROUNDS]


def _permute(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


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
