"""Files that a reader sees whole, the old one or the new one, also after a loss of power."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside its place, renamed when the block ends; folders above it are made.

    File and folder are flushed to the device: without the first a loss of power may leave the new
    name over an empty file, without the second the old file may be back.

    Raises:
        OSError: it cannot be written. After any error what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file as ``open_whole`` does, text as UTF-8; raises as it."""
    with open_whole(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the device."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
