"""How fast a task is written at real sizes, compared with ``dd`` to the same disk.

Data flow: random chunks from a small pool -> an ``Attempt`` with five arrays, as the encode stage
writes one -> its commit; then ``dd`` of as many bytes; both again. Both end when the bytes are on
the disk.
"""

import math
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pipeline.bench.reader_store import BLOCK_SHAPE
from pipeline.bench.store import make_layers
from pipeline.storage.local import LocalStorage
from pipeline.store.attempt import Attempt
from pipeline.store.layout import block_name, features_row_shapes

_POOL_ROWS = 8
_SOURCE = "dd-source"


@dataclass(frozen=True, slots=True)
class WriteSpeed:
    """One write of ``mb``; ``of_dd`` is its speed over that of the ``dd`` after it."""

    writer: str
    run: int
    mb: float
    seconds: float
    mb_per_s: float
    of_dd: float | None


class _TimedStorage(LocalStorage):
    """A local storage that adds up the seconds of reading back what was written."""

    read_back_s = 0.0

    def digest(self, path: str) -> tuple[int, str]:
        start = time.perf_counter()
        found = super().digest(path)
        self.read_back_s += time.perf_counter() - start
        return found


def count_rows(num_bytes: int) -> int:
    """Return how many rows make up ``num_bytes`` of five blocks' features."""
    _, layer = make_layers()
    spec = layer.features
    row_bytes = len(spec.blocks) * spec.num_draws * int(np.prod(BLOCK_SHAPE)) * 2
    return max(num_bytes // row_bytes, 1)


def write_task(folder: Path, num_rows: int, *, num_blocks: int = 5) -> tuple[int, float, float]:
    """Write and commit a features task of ``num_rows``; return bytes, seconds, s of reading back.

    Each row has 3 draws of ``num_blocks`` blocks, (1280, 12, 12) float16 each.
    """
    _, layer = make_layers()
    spec = layer.features
    names = [block_name(number) for number in spec.blocks[:num_blocks]]
    shapes = features_row_shapes(spec, dict.fromkeys(spec.blocks, BLOCK_SHAPE))
    shape = (_POOL_ROWS * spec.num_draws, *BLOCK_SHAPE)
    pool = np.frombuffer(np.random.default_rng(0).bytes(math.prod(shape) * 2), "f2").reshape(shape)
    storage = _TimedStorage(folder)
    start = time.perf_counter()
    with Attempt(storage, layer, "bench", generation=0) as attempt:
        arrays = attempt.open_arrays(shapes)
        arrays["timestep"].append_rows(np.zeros((num_rows, spec.num_draws), np.int16))
        for first in range(0, num_rows, _POOL_ROWS):
            chunks = pool[: min(_POOL_ROWS, num_rows - first) * spec.num_draws]
            for name in names:
                arrays[name].append_chunks(chunks)
        rows = {"pairs": num_rows, "views": num_rows, "prompts": 1}
        commit, _ = attempt.commit(rows=rows, pairs_sha256="0" * 64, provenance={})
    return commit.num_bytes, time.perf_counter() - start, storage.read_back_s


def copy_by_dd(source: Path, target: Path) -> float:
    """Copy a file by ``dd bs=1M conv=fsync``; return seconds."""
    command = ["dd", f"if={source}", f"of={target}", f"bs={2**20}", "conv=fsync", "status=none"]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def measure_write(folder: Path, num_bytes: int, *, repeats: int = 2) -> list[WriteSpeed]:
    """Write about ``num_bytes`` by an attempt and by ``dd``, in turns, all below ``folder``.

    ``dd`` reads a file that lies in the page cache, as the attempt's chunks lie in memory.
    """
    num_rows = count_rows(num_bytes)
    rows: list[WriteSpeed] = []
    source = folder / _SOURCE
    try:
        for run in range(1, repeats + 1):
            os.sync()  # what others left to write
            with TemporaryDirectory(dir=folder) as made:
                size, seconds, read_back_s = write_task(Path(made), num_rows)
                if run == 1:
                    _join_files(Path(made), source)
            with source.open("rb") as file:
                while file.read(2**24):
                    pass  # into the page cache
            os.sync()
            with TemporaryDirectory(dir=folder) as made:
                dd_s = copy_by_dd(source, Path(made) / "copy")
            times = {"attempt": seconds, "attempt, not read back": seconds - read_back_s}
            for writer, taken in {**times, "dd": dd_s}.items():
                of_dd = None if writer == "dd" else dd_s / taken
                rows.append(WriteSpeed(writer, run, size / 1e6, taken, size / 1e6 / taken, of_dd))
    finally:
        source.unlink(missing_ok=True)
    return rows


def _join_files(folder: Path, target: Path) -> None:
    with target.open("wb") as joined:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                joined.write(path.read_bytes())
