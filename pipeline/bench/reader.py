"""How fast the features of random pairs are read, compared with other readers of the same bytes.

Data flow: a store of random features -> the same chunks in one plain file -> random batches, read
by each reader in turns -> the median over turns of the ratios. All files are in the page cache. On
an object store the other reader is raw ranged GETs: one a chunk, as many at once as our reader has
threads.
"""

import importlib.util
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import zarr

from pipeline.base.progress_text import count_noun
from pipeline.bench.reader_store import (
    BLOCK_SHAPE,
    BLOCKS,
    CHUNK_BYTES,
    TINY_BLOCK,
    write_plain_file,
    write_reader_store,
    write_tiny_tasks,
)
from pipeline.read.reader import PairReader
from pipeline.read.source import Source
from pipeline.storage.local import LocalStorage
from pipeline.storage.open import open_storage
from pipeline.store.array_writer import CRC_BYTES
from pipeline.store.layout import GROUP, block_name

PLAIN, OURS, ZARR, GETS = "memory map of a plain file", "ldznet", "zarr-python", "ranged GETs"
_PLAIN_FILE = "plain.bin"
_TENSORSTORE = "tensorstore"
_WHOLE = frozenset({"latent", "text", "features"})
_TINY_PAIRS = 2  # a task
_FEW = 64  # tasks: a batch is hardly ever two pairs of one, and all their files stay open
BatchReader = Callable[[np.ndarray], object]  # of pair numbers


@dataclass(frozen=True, slots=True)
class ReaderSpeed:
    """A reader's speed; the ratios to other readers' speeds are medians over turns."""

    reader: str
    gb_per_s: float  # median over turns
    of_plain: float | None  # over the memory map, or over raw GETs on an object store
    of_zarr: float | None
    of_few: float | None = None  # of many tasks, over as many pairs of a few


def measure_reader(
    folder: Path,
    *,
    num_tasks: int = 64,
    task_pairs: int = 8,
    batch: int = 32,
    turns: int = 20,
    many_tasks: int = 2000,
) -> list[ReaderSpeed]:
    """Measure readers of a local store of 1.84 MB a pair, which stays below ``folder``.

    tensorstore is one of them if it is installed. The last row is ``measure_tasks``.
    """
    storage = LocalStorage(folder / "store")
    source = write_reader_store(storage, num_tasks=num_tasks, task_pairs=task_pairs)
    write_plain_file(source, folder / _PLAIN_FILE)
    reader = _open_ours(source)
    readers: dict[str, BatchReader] = {PLAIN: _open_plain(folder / _PLAIN_FILE, batch)}
    for num in sorted({1, 2, 4, storage.reads_at_once}):
        readers[f"{OURS}, {count_noun(num, 'thread')}"] = _read_ours(_open_ours(source, num))
    readers[ZARR] = _open_zarr(source, batch)
    if importlib.util.find_spec(_TENSORSTORE):
        readers[_TENSORSTORE] = _open_tensorstore(source, batch)
    times = _take_turns(readers, num_pairs=len(reader), batch=batch, turns=turns)
    tiny = measure_tasks(folder, num_tasks=many_tasks, batch=batch, turns=turns)
    return [*_compare(times, batch, plain=PLAIN), tiny]


def measure_objects(
    url: str, *, num_tasks: int = 16, task_pairs: int = 8, batch: int = 16, turns: int = 10
) -> list[ReaderSpeed]:
    """Measure reading from an object store, compared with raw GETs; a store stays at ``url``."""
    source = write_reader_store(open_storage(url), num_tasks=num_tasks, task_pairs=task_pairs)
    reader = _open_ours(source)
    readers = {GETS: _open_gets(source), OURS: _read_ours(reader)}
    times = _take_turns(readers, num_pairs=len(reader), batch=batch, turns=turns)
    return _compare(times, batch, plain=GETS)


def measure_tasks(folder: Path, *, num_tasks: int, batch: int, turns: int) -> ReaderSpeed:
    """Measure whole pairs of many tiny tasks, compared with as many pairs of a few tasks.

    All were read once before. A global shuffle takes nearly every pair of a batch from another
    task. If a task's record, index and array metadata were dropped before its next pair, reading
    them again would cost some ten times the pair. The stores stay below ``folder``.
    """
    num_pairs, num_few = num_tasks * _TINY_PAIRS, min(_FEW, num_tasks)
    counts = {"many": (num_tasks, _TINY_PAIRS), "few": (num_few, num_pairs // num_few)}
    readers: dict[str, BatchReader] = {}
    for name, (num, pairs) in counts.items():
        storage = LocalStorage(folder / name)
        readers[name] = _read_whole(write_tiny_tasks(storage, num_tasks=num, task_pairs=pairs))
    num_pairs = min(num * pairs for num, pairs in counts.values())
    times = _take_turns(readers, num_pairs=num_pairs, batch=batch, turns=turns)
    of_few = median(few / many for few, many in zip(times["few"], times["many"], strict=True))
    chunk_bytes = int(np.prod(TINY_BLOCK)) * 2
    speed = min(batch, num_pairs) * len(BLOCKS) * chunk_bytes / 1e9 / median(times["many"])
    return ReaderSpeed(f"{OURS}, {count_noun(num_tasks, 'tiny task')}", speed, None, None, of_few)


def _read_whole(source: Source) -> BatchReader:
    reader = PairReader(source, tasks="*", inputs=_WHOLE, blocks=BLOCKS)
    return lambda numbers: reader.read(numbers, draws=[0] * len(numbers))


def _open_ours(source: Source, num_threads: int | None = None) -> PairReader:
    inputs = frozenset({"features"})
    return PairReader(source, tasks="*", inputs=inputs, blocks=BLOCKS, num_threads=num_threads)


def _read_ours(reader: PairReader) -> BatchReader:
    return lambda numbers: reader.read_features(numbers, draws=[0] * len(numbers))


def _open_plain(path: Path, batch: int) -> BatchReader:
    mapped = np.memmap(path, np.uint8, mode="r").reshape(-1, len(BLOCKS), CHUNK_BYTES)
    assert mapped[..., ::4096].any()  # every page is there
    out = np.zeros((len(BLOCKS), batch, CHUNK_BYTES), np.uint8)

    def read(numbers: np.ndarray) -> None:
        for place, number in enumerate(numbers):
            for block in range(len(BLOCKS)):
                out[block, place] = mapped[number, block]

    return read


def _list_arrays(source: Source, open_array: Callable[[Path], Any]) -> tuple[list[list[Any]], int]:
    """Return each task's arrays, one a block, in the reader's order; and the pairs of a task."""
    assert source.features is not None
    assert isinstance(source.store.storage, LocalStorage)
    commits = source.store.newest_commits(source.features.folder).values()
    found = []
    for commit in commits:
        group = source.store.storage.local_path(f"{commit.data_folder}/{GROUP}")
        found.append([open_array(group / block_name(block)) for block in BLOCKS])
    return found, commit.rows["pairs"]


def _open_zarr(source: Source, batch: int) -> BatchReader:
    arrays, num = _list_arrays(source, lambda path: zarr.open_array(path, mode="r"))
    out = np.zeros((len(BLOCKS), batch, *BLOCK_SHAPE), np.float16)

    def read(numbers: np.ndarray) -> None:
        for place, number in enumerate(numbers):
            for block in range(len(BLOCKS)):
                out[block, place] = arrays[number // num][block][number % num, 0]

    return read


def _open_tensorstore(source: Source, batch: int) -> BatchReader:
    tensorstore = importlib.import_module(_TENSORSTORE)

    def open_array(path: Path) -> Any:
        kvstore = {"driver": "file", "path": f"{path}/"}
        return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()

    arrays, num = _list_arrays(source, open_array)
    out = np.zeros((len(BLOCKS), batch, *BLOCK_SHAPE), np.float16)

    def read(numbers: np.ndarray) -> None:
        futures = [
            (block, place, arrays[number // num][block][number % num, 0].read())
            for place, number in enumerate(numbers)
            for block in range(len(BLOCKS))
        ]
        for block, place, future in futures:
            out[block, place] = future.result()

    return read


def _open_gets(source: Source) -> BatchReader:
    assert source.features is not None
    storage = source.store.storage
    commits = list(source.store.newest_commits(source.features.folder).values())
    num = commits[0].rows["pairs"]
    pool = ThreadPoolExecutor(storage.reads_at_once)
    end = "c/0" + "/0" * (len(BLOCK_SHAPE) + 1)

    def get(place: tuple[int, int]) -> int:
        number, block = place
        path = f"{commits[number // num].data_folder}/{GROUP}/{block_name(block)}/{end}"
        chunk_bytes = CHUNK_BYTES + CRC_BYTES
        return len(storage.read_range(path, number % num * chunk_bytes, chunk_bytes))

    def read(numbers: np.ndarray) -> None:
        places = [(int(number), block) for number in numbers for block in BLOCKS]
        assert sum(pool.map(get, places)) == len(places) * (CHUNK_BYTES + CRC_BYTES)

    return read


def _take_turns(
    readers: dict[str, BatchReader], *, num_pairs: int, batch: int, turns: int
) -> dict[str, list[float]]:
    """Return each reader's seconds for a random batch in each turn, after reading all once."""
    rng = np.random.default_rng(0)
    for read in readers.values():
        for first in range(0, num_pairs, batch):
            read(np.arange(first, min(first + batch, num_pairs)))
    times: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(turns):
        for name, read in readers.items():
            numbers = rng.permutation(num_pairs)[:batch]
            start = time.perf_counter()
            read(numbers)
            times[name].append(time.perf_counter() - start)
    return times


def _compare(times: dict[str, list[float]], batch: int, *, plain: str) -> list[ReaderSpeed]:
    def ratio(name: str, peer: str) -> float | None:
        if peer not in times:
            return None
        return median(theirs / ours for ours, theirs in zip(times[name], times[peer], strict=True))

    gb = batch * len(BLOCKS) * CHUNK_BYTES / 1e9
    return [
        ReaderSpeed(name, gb / median(taken), ratio(name, plain), ratio(name, ZARR))
        for name, taken in times.items()
    ]
