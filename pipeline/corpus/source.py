"""An open tar and its identity: its bytes at a URL, its size, the digest of its start."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from pipeline.base.remote_copy import OnBytes, as_oserror, copy_file, open_filesystem, retry
from pipeline.corpus.tasks import Task
from pipeline.store.commit import SourceTar

HEAD_BYTES = 64 * 1024
_HASH_BYTES = 1024 * 1024


class SourceChangedError(RuntimeError):
    """A tar that is not what the inventory saw."""


@contextmanager
def open_source(
    task: Task, *, on_bytes: OnBytes | None = None
) -> Iterator[tuple[BufferedReader, SourceTar]]:
    """Open a task's tar for random access, a remote one through a temporary local copy.

    The whole of a remote tar is fetched for a part too, so a tar of n parts n times: the SHA-256
    of all of it holds parts to one tar (``tar_part.pin_source``). The copy takes its
    bytes in the folder for temporary files (TMPDIR) until leaving, which may be in another thread
    than entering.

    ``on_bytes`` is called with every piece of bytes that came from the source, and with 0 while a
    copy is hashed. Fetching may start anew after a fault, and then counts again.

    Raises:
        SourceChangedError: the tar's size is not the inventory's, or it changed while open.
        FileNotFoundError, PermissionError: at once.
        OSError: it could not be read in ``remote_copy.NUM_TRIES`` tries, or TMPDIR has no room.
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
    with tempfile.NamedTemporaryFile(prefix="ldznet-", suffix=".tar") as copy:
        target = Path(copy.name)
        copy_file(
            *(filesystem, path, target),
            url=task.url,
            num_bytes=task.num_bytes,
            on_bytes=on_bytes,
        )
        file = target.open("rb")
    with file:  # without a name from here on, so that a killed process leaves nothing of it
        yield file, _describe(file, task, _sign_of_life(on_bytes))


def _sign_of_life(on_bytes: OnBytes | None) -> OnBytes | None:
    return None if on_bytes is None else lambda _: on_bytes(0)


def _describe(file: BufferedReader, task: Task, on_bytes: OnBytes | None) -> SourceTar:
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
    )


def digest_head(task: Task) -> str:
    """Return SHA-256 (hex) over a tar's first 64 KiB, from one ranged read, tried again as needed.

    Raises:
        OSError: as ``open_source``.
    """
    filesystem, path = open_filesystem(task.url)

    def read() -> bytes:
        with as_oserror(task.url):
            return bytes(filesystem.cat_file(path, start=0, end=HEAD_BYTES))

    return hashlib.sha256(retry(read, what=task.url)).hexdigest()
