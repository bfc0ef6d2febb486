"""What every kind of storage offers a store, its errors, and the check of paths.

Everything above names files by POSIX paths relative to the store. A folder is there as soon as a
file is below it. Assumed of every kind: ``create`` has one winner, and whoever reads or lists
after a write or a removal came back sees it (a POSIX file system; Amazon S3 since December 2020).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol, Self

Memory = memoryview | bytearray  # of bytes
Part = tuple[int, Sequence[Memory]]  # where a range starts in a file, and what it fills


class StorageError(OSError):
    """The storage refused or failed something, with what and where."""


class UnsafePathError(ValueError):
    """A path that would leave the store."""


def check_path(path: str) -> str:
    """Return ``path`` if it is a plain relative POSIX path inside the store.

    Raises:
        UnsafePathError: absolute, empty, with ``..``, a backslash or a NUL.
    """
    parts = set(path.split("/"))  # not pathlib's, which takes 10 us, and this is asked a chunk
    if parts <= {"", "."} or path[0] == "/" or ".." in parts or "\\" in path or "\0" in path:
        raise UnsafePathError(f"expected a relative path inside the store, got {path!r}")
    return path


class NewFile(ABC):
    """A file being written once, front to back, its SHA-256 taken on the way.

    ``close`` makes it durable. Leaving the ``with`` block by an error abandons it.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``; raises OSError where the storage does not take it."""
        self._append(data)
        self._digest.update(data)
        self.num_bytes += len(data) if isinstance(data, bytes) else data.nbytes

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._digest.hexdigest()

    @abstractmethod
    def _append(self, data: bytes | memoryview) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Make the file durable under its name; a second time does nothing.

        Raises:
            OSError: the storage failed; the file may be missing or, on POSIX, cut.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Let go of the file, which nobody may count on; after ``close``, nothing happens."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


class Storage(Protocol):
    """The files of one store. Safe to share between threads; another process opens its ``url``.

    Every method raises UnsafePathError for a path that would leave the store, FileNotFoundError
    where a file that it reads is missing, PermissionError where access is denied (never taken for
    "missing"), and another OSError where the storage fails for longer than it is tried again.
    """

    @property
    def url(self) -> str:
        """What ``open_storage`` opens it by."""

    @property
    def create_needs(self) -> str:
        """What ``create`` needs of the storage, for an error's text."""

    @property
    def reads_at_once(self) -> int:
        """Threads that read small parts of files at full speed."""

    def exists(self, path: str) -> bool:
        """Tell whether a file or folder is there."""

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""

    def read_range(self, path: str, start: int, num_bytes: int) -> bytes:
        """Return bytes [start, start + num_bytes) of a file, fewer only where it ends before."""

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return (start, bytes) ranges of a file, each fewer only where the file ends before."""

    def read_into(self, path: str, parts: Sequence["Part"]) -> bool:
        """Read parts of a file, each a range that fills its memories one after another.

        False where the file ends inside a part; what any of the memories holds is then undefined.
        """

    def size(self, path: str) -> int:
        """Return a file's size in bytes."""

    def digest(self, path: str) -> tuple[int, str]:
        """Read a file back and return its size in bytes and its SHA-256 in hex."""

    def list_names(self, folder: str | None = None) -> Iterator[str]:
        """Yield the names in a folder (None: the store's own), in no order; none without it."""

    def list_files(self, folder: str | None = None) -> Iterator[tuple[str, int]]:
        """Yield (path in the store, bytes) of every file below a folder, in no order."""

    def find_time(self, path: str) -> float | None:
        """Return when a file was written, by the storage's clock: seconds since the epoch.

        None where the file is gone or the storage does not tell. For people to read, never to
        decide by: clocks are wrong, and a copied store has the copy's times.
        """

    def list_times(self, folder: str) -> dict[str, float]:
        """Return name → ``find_time`` of a folder's files, of those where a listing tells it.

        None of them where each would take a look of its own, as on a file system.
        """

    def open_write(self, path: str) -> NewFile:
        """Open a file under a new name for writing once; its folders are made."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a whole small file if and only if none is there; False where there is one already.

        The file is never seen half written. Where an answer was lost on the way, the one already
        there may be the caller's own: who needs to know writes something unique and reads it back.
        """

    def sync_folders(self, folder: str) -> None:
        """Make the names of a folder, of all below it and of those above it durable."""

    def remove_tree(self, path: str) -> None:
        """Remove a file, or a folder and all below it, as far as can be; the rest stays."""

    def release(self) -> None:
        """Let go of what reading keeps open; later reads open it anew."""
