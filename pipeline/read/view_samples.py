"""Samples of ``views="one"``: each phrase of a key yields one of its stored views an epoch.

Data flow: a task's index -> its pairs grouped by (key, phrase, instance), a sample each -> in each
epoch one pair of every sample is drawn. Equal phrases of one key are instances, each with a mask
of its own, and so no views of one another. Kept are 4 bytes a pair and 8 a sample.
"""

import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa

from pipeline.read.order import mix_bits


@dataclass(frozen=True, slots=True)
class ViewGroups:
    """Pairs of some tasks by sample, tasks one after another, samples as they first appear.

    ``pairs`` (pairs,) int32 are a task's pairs in the order of its samples, ``firsts`` (samples,)
    int32 says where in that order each sample begins, ``hashes`` (samples,) uint32 are of key,
    phrase and instance, and ``nums`` (tasks,) int64 are the samples of each task.
    """

    pairs: np.ndarray
    firsts: np.ndarray
    hashes: np.ndarray
    nums: np.ndarray

    @classmethod
    def join(cls, parts: Iterable["ViewGroups"]) -> Self:
        """Return the groups of all tasks of some groups."""
        rows = ((part.pairs, part.firsts, part.hashes, part.nums) for part in parts)
        columns = list(zip(*rows, strict=True))
        return cls(*(np.concatenate(columns.pop(0)) for _ in range(4)))  # a column's parts go


def group_views(index: pa.Table, rows: np.ndarray | None) -> ViewGroups:
    """Group the chosen rows of a task's index (None: all) by key, phrase and instance."""
    names = index.select(["key", "phrase", "instance"])
    names = (names if rows is None else names.take(pa.array(rows))).combine_chunks()
    codes = np.zeros(len(names), np.int64)
    for column in names.columns:
        values = column.combine_chunks().dictionary_encode(null_encoding="encode")
        codes = codes * max(len(values.dictionary), 1) + values.indices.to_numpy()
    _, found_at, of_code = np.unique(codes, return_index=True, return_inverse=True)
    ranks = np.empty(len(found_at), np.int64)
    ranks[np.argsort(found_at)] = np.arange(len(found_at))
    samples = ranks[of_code]
    pairs = np.argsort(samples, kind="stable")
    firsts = np.searchsorted(samples[pairs], np.arange(len(found_at)))
    of_samples = names.take(pa.array(np.sort(found_at)))
    hashes = [
        # The first instance has none in its hash, as older stores have none: epochs stay.
        zlib.crc32("\0".join([key, phrase or "", *([str(instance)] if instance else [])]).encode())
        for key, phrase, instance in zip(*of_samples.to_pydict().values(), strict=True)
    ]
    return ViewGroups(
        pairs.astype(np.int32),
        firsts.astype(np.int32),
        np.array(hashes, np.uint32),
        np.array([len(hashes)]),
    )


class ViewSamples:
    """The samples of all tasks, by number from 0, and their pairs."""

    def __init__(self, groups: ViewGroups, pair_starts: np.ndarray) -> None:
        self._groups = groups
        self._pair_starts = pair_starts
        self.starts = np.cumsum([0, *groups.nums])  # of each task's samples

    def choose_pairs(self, samples: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
        """Return the number of the pair drawn for each sample, int64 (n,).

        A pure function of (seed, epoch, key, phrase, instance) and of how many views there are.

        Raises:
            IndexError: no such sample.
        """
        check_numbers(samples, int(self.starts[-1]), "sample")
        tasks = np.searchsorted(self.starts, samples, side="right") - 1
        firsts = self._groups.firsts[samples].astype(np.int64)
        ends = self._pair_starts[tasks + 1] - self._pair_starts[tasks]  # of a task's last sample
        inner = samples + 1 < self.starts[tasks + 1]
        ends[inner] = self._groups.firsts[samples[inner] + 1]
        text = f"ldznet\0view\0{seed}\0{epoch}"
        key = np.frombuffer(hashlib.sha256(text.encode()).digest(), "<u8")[0]
        bits = mix_bits(self._groups.hashes[samples].astype(np.uint64) ^ key)
        views = (bits % (ends - firsts).astype(np.uint64)).astype(np.int64)
        starts = self._pair_starts[tasks]
        return starts + self._groups.pairs[starts + firsts + views]


def check_numbers(numbers: np.ndarray, num: int, what: str) -> None:
    """Raise IndexError for the first of some numbers of something that is not in [0, num)."""
    wrong = numbers[(numbers < 0) | (numbers >= num)]
    if len(wrong):
        raise IndexError(f"no {what} {wrong[0]} among {num}")
