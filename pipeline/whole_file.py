"""Files that a reader sees whole, the old one or the new one, also after a loss of power."""

import os
from pathlib import Path

from pipeline.local_storage import sync_folder


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file beside its place, text as UTF-8, and rename it; folders above it are made.

    File and folder are flushed to the device: without the first a loss of power may leave the new
    name over an empty file, without the second the old file may be back.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
