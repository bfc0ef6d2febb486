"""A folder written beside its place and renamed: there whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes ``out`` when the block ends without an error.

    Every file is flushed to the device before, and readable as the folder is. After an error
    nothing is left; what a killed process leaves is a folder beside ``out`` whose name starts with
    a dot.

    Raises:
        ValueError: ``out`` is there already, and is no empty folder.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ValueError(f"{out}: expected no file or folder, or an empty one; give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # safetensors gives its files to their owner alone
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                path.chmod(mode)
            _flush(path)
        _flush(temporary)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush(out.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
