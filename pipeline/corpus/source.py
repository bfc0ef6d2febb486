"""Opens a task's tar, a remote one through a local copy, and computes its digests."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline.base.node_fault import NodeError, blaming_node
from pipeline.base.remote_copy import OnBytes, as_oserror, copy_file, open_filesystem, retry
from pipeline.corpus.tasks import Task
from pipeline.store.commit import SourceTar

HEAD_BYTES = 64 * 1024
_HASH_BYTES = 1024 * 1024


class SourceChangedError(RuntimeError):
    """A tar that is not the one that was listed."""


@contextmanager
def open_source(
    task: Task, *, on_bytes: OnBytes | None = None
) -> Iterator[tuple[BinaryIO, SourceTar]]:
    """Open a task's tar for random access, a remote one through a copy in TMPDIR.

    For a part of a remote tar too, all of it is fetched, since its SHA-256 ties the parts together
    (``parts.pin_source``). The context may be left in another thread than it was entered in.

    ``on_bytes`` is called with the number of bytes that came from the source, and with 0 while a
    copy is hashed. A fetch that starts again after a fault counts again.

    Raises:
        SourceChangedError: the tar's size is not as listed, or it changed while open.
        FileNotFoundError, PermissionError: at once.
        OSError: it could not be read for as long as patience lasts, or TMPDIR has no room.
    """
    filesystem, path = open_filesystem(task.url)
    if "file" in filesystem.protocol:
        with Path(path).open("rb") as file:
            before = os.fstat(file.fileno())
            yield file, _describe(file, task, on_bytes)
            after = Path(path).stat()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise SourceChangedError(f"{task.url}: was written to while it was read")
        return
    with _open_copy() as copy:  # without a name: a killed process leaves none
        copy_file(
            *(filesystem, path, copy),
            folder=Path(tempfile.gettempdir()),
            url=task.url,
            num_bytes=task.num_bytes,
            on_bytes=on_bytes,
        )
        on_hashed = None if on_bytes is None else lambda _: on_bytes(0)
        yield copy, _describe(copy, task, on_hashed)


def _open_copy() -> BinaryIO:
    """Open a new file in TMPDIR; whatever is in the way is this machine's fault."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:  # no folder takes a file
        raise NodeError(error.errno, str(error.strerror)) from error
    with blaming_node(Path(folder)):
        return tempfile.TemporaryFile(dir=folder)


def _describe(file: BinaryIO, task: Task, on_bytes: OnBytes | None) -> SourceTar:
    digest, head = hashlib.sha256(), b""
    while piece := file.read(_HASH_BYTES):
        head = head or piece[:HEAD_BYTES]
        digest.update(piece)
        if on_bytes is not None:
            on_bytes(len(piece))
    num_bytes = file.tell()
    file.seek(0)
    if num_bytes != task.num_bytes:
        raise SourceChangedError(
            f"{task.url}: expected {task.num_bytes} bytes as listed, got {num_bytes}; the tar "
            "changed since; run the command again to list it anew"
        )
    return SourceTar(
        url=task.url,
        num_bytes=num_bytes,
        sha256=digest.hexdigest(),
        head_sha256=hashlib.sha256(head).hexdigest(),
        marks=task.marks,
    )


def hash_tar(task: Task, *, on_bytes: OnBytes | None = None) -> str:
    """Read a tar whole and return its SHA-256 (hex); errors as ``open_source``."""
    with open_source(task, on_bytes=on_bytes) as (_, source):
        return source.sha256


def is_there(url: str) -> bool:
    """Return whether there is a file; OSError where the storage does not tell."""
    filesystem, path = open_filesystem(url)

    def ask() -> bool:
        with as_oserror(url):
            try:
                filesystem.info(path)
            except FileNotFoundError:
                return False
        return True

    return retry(ask, what=url)


def digest_head(task: Task) -> str:
    """Return the SHA-256 (hex) of a tar's first 64 KiB, by a ranged read; OSError as above."""
    filesystem, path = open_filesystem(task.url)

    def read() -> bytes:
        with as_oserror(task.url):
            return bytes(filesystem.cat_file(path, start=0, end=HEAD_BYTES))

    return hashlib.sha256(retry(read, what=task.url)).hexdigest()
