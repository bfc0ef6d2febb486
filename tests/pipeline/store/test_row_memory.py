"""Rows of memory and their checksums, the same with the C library as without."""

import _ctypes

import google_crc32c
import numpy as np
import pytest

from pipeline.store import row_memory
from pipeline.store.row_memory import RowMemory


def test_rows_are_views_of_an_array():
    array = np.zeros((3, 2, 2), np.float16)
    memory = RowMemory(array)
    assert memory.row_bytes == 8
    memory.row(1)[:] = b"\xff" * 8
    assert np.isnan(array[1]).all()
    assert not array[[0, 2]].any()


@pytest.mark.parametrize("library", ["libcrc32c", "no such library"])
def test_a_checksum_is_crc_32c_of_a_row(library, monkeypatch):
    monkeypatch.setattr(row_memory, "_LIBRARY", library)
    found = row_memory._find_crc32c()
    monkeypatch.setattr(row_memory, "crc32c_at", found)
    assert hasattr(found, "argtypes") == (library == "libcrc32c")
    array = np.random.default_rng(0).integers(0, 256, (4, 1001)).astype(np.uint8)
    memory = RowMemory(array)
    for place in range(4):
        assert memory.checksum(place) == google_crc32c.value(array[place].tobytes())


def test_other_threads_run_while_a_checksum_is_taken():
    """ctypes gives Python's lock away for a call, but for functions that it says need it."""
    flags = type(row_memory.crc32c_at)._flags_
    assert not flags & _ctypes.FUNCFLAG_PYTHONAPI
