"""Atomic writes of files and folders: a reader sees old or new, also after a loss of power."""

import fcntl
import json
import os
import shutil
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


def write_json(path: Path, data: object) -> None:
    """Write JSON of one line a value, as ``write_whole`` does."""
    write_whole(path, json.dumps(data, indent=1) + "\n")


@contextmanager
def write_new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes ``out`` when the block ends without an error.

    Every file is flushed to the device before, and readable as the folder is. After an error
    nothing is left; what a killed process leaves is a folder beside ``out`` whose name starts with
    a dot.

    Raises:
        ValueError: ``out`` is there already, and is no empty folder.
    """
    refuse_taken(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # safetensors gives its files to their owner alone
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                path.chmod(mode)
            sync_path(path)
        sync_path(temporary)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_path(out.parent)


def refuse_taken(out: Path) -> None:
    """Raise ValueError where a new folder's place holds something."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ValueError(f"{out}: expected no file or folder, or an empty one; give another --out")


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
