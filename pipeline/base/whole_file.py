"""Atomic file writes: a reader sees the old file or the new one, also after a loss of power."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes ``path`` when the block ends; its folders are made.

    File and folder are flushed to the device: without the first, a loss of power may leave the new
    name over an empty file; without the second, the old file may be back.

    Raises:
        OSError: it cannot be written. After any error, what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            flush_to_device(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file as ``open_whole`` does, text as UTF-8."""
    with open_whole(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def sync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush_to_device(descriptor)
    finally:
        os.close(descriptor)


def flush_to_device(descriptor: int) -> None:
    """Flush an open file or folder; on macOS the drive's own cache too, which its fsync leaves."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # not every file system there has it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)
