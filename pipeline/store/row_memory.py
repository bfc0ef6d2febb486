"""Memory that chunks are read into, a row each, and their CRC-32C without Python's lock."""

import ctypes
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files

import google_crc32c
import numpy as np

_PACKAGE, _LIBRARY = "google-crc32c", "libcrc32c"
_KNOWN = (b"123456789", 0xE3069283)  # the check value of CRC-32C


def _find_crc32c() -> Callable[[int, int], int]:
    """Return CRC-32C of (address, bytes).

    google_crc32c's own function holds Python's lock, 13 us for a chunk of 369 KB, in which no other
    thread can even begin to read. The C library that its wheels bring is the same code without
    that; where a wheel brings none, theirs is called.
    """
    try:
        found = [file for file in files(_PACKAGE) or () if file.name.startswith(_LIBRARY)]
    except PackageNotFoundError:
        found = []
    for file in found:
        try:
            value = ctypes.CDLL(str(file.locate())).crc32c_value
        except (OSError, AttributeError):  # of another machine, or without this function
            continue
        value.argtypes, value.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint32
        data = ctypes.create_string_buffer(_KNOWN[0])
        if value(ctypes.addressof(data), len(_KNOWN[0])) == _KNOWN[1]:
            return value
    return lambda address, num_bytes: google_crc32c.value(ctypes.string_at(address, num_bytes))


crc32c_at = _find_crc32c()


class RowMemory:
    """The memory of an array's rows, which must be contiguous and may be written.

    ``row_bytes`` is a row's size; ``array`` is kept while its memory is in use.
    """

    __slots__ = ("_address", "_array", "_view", "row_bytes")

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self._address = array.ctypes.data
        self._view = array.reshape(-1).view(np.uint8).data
        self.row_bytes = len(self._view) // max(len(array), 1)

    def row(self, place: int) -> memoryview:
        """Return the bytes of a row."""
        start = place * self.row_bytes
        return self._view[start : start + self.row_bytes]

    def checksum(self, place: int) -> int:
        """Return the CRC-32C of a row's bytes."""
        return crc32c_at(self._address + place * self.row_bytes, self.row_bytes)
