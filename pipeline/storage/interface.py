"""The interface of a storage, its errors, and the check of paths.

Callers name files by POSIX paths relative to the store. A folder exists as soon as a file is below
it. Every storage must guarantee that ``create`` has one winner, and that whoever reads or lists
after a write or removal has returned sees it (a POSIX file system; S3 since December 2020).
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

logger = logging.getLogger(__name__)
Memory = memoryview | bytearray  # of bytes
Scatter = tuple[int, Sequence[Memory]]  # where a range starts in a file, and what it fills


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that was begun on an object store and has not ended; ``num_bytes`` have arrived.

    ``abort`` removes those; the file cannot end any more.
    """

    path: str
    num_bytes: int
    abort: Callable[[], None]


class StorageError(OSError):
    """A request that the storage refused or failed; says what and where."""


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
    """A file written once, front to back; its SHA-256 is computed on the way.

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
        """Give the file up, after which it may be missing or cut; nothing after ``close``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


class Storage(Protocol):
    """The files of one store. Threads may share it; another process opens its ``url``.

    Every method raises UnsafePathError for a path that would leave the store, FileNotFoundError
    if a file to read is missing, PermissionError if access is denied (never taken for "missing"),
    OutageError if it does not answer for as long as patience lasts, and another OSError if it
    fails.
    """

    url: str
    """What ``open_storage`` takes."""
    create_needs: str
    """What ``create`` needs of the storage, for error messages."""

    @property
    def reads_at_once(self) -> int:
        """How many threads reach full speed when they read small parts of files."""

    def exists(self, path: str) -> bool:
        """Return whether a file is there."""

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""

    def read_range(self, path: str, start: int, num_bytes: int) -> bytes:
        """Return bytes [start, start + num_bytes) of a file, fewer only at its end."""

    def read_tail(self, path: str, num_bytes: int) -> tuple[bytes, int]:
        """Return a file's last bytes, fewer where it has fewer, and its size in bytes."""

    def read_into(self, path: str, parts: Sequence[Scatter]) -> bool:
        """Read ranges of a file, each into its memories, one after another.

        False if the file ends inside a range; the contents of all memories are then undefined.
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
        """Return when a file was written, in seconds since the epoch by the storage's clock.

        None if the file is gone or the storage does not tell. Only for people to read, never to
        decide by: clocks are wrong, and a copied store has the copy's times.
        """

    def list_times(self, folder: str) -> dict[str, float]:
        """Return name → ``find_time`` of a folder's files, as far as a listing tells it.

        Empty if each file would need a request of its own, as on a file system.
        """

    def open_write(self, path: str) -> NewFile:
        """Open a file under a new name to write it once; its folders are made.

        Raises:
            FileExistsError: a file system has a file of this name; object stores do not tell.
        """

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file if and only if there is none; return False if there is one already.

        The file is never seen half written. After a lost answer, the one already there may be the
        caller's own: who needs to know writes something unique and reads it back.
        """

    def write_content(self, path: str, data: bytes) -> None:
        """Write a small file named by its content, unless it is there: all write the same.

        It is never seen half written. Needs of a file system less than ``create``.
        """

    def sync_folders(self, folder: str) -> None:
        """Make the names in a folder, in all folders below and in those above it durable."""

    def remove_tree(self, path: str) -> None:
        """Remove a file, or a folder and all below it; what is gone meanwhile is fine."""

    def list_uploads(self, folder: str) -> Iterator[Upload]:
        """Yield the uploads below a folder that have not ended, sorted by path.

        Their writers are at work or were killed. None on a file system, where they are files.
        """

    def release(self) -> None:
        """Close the files that reading keeps open; later reads open them anew."""


def remove_leftovers(storage: Storage, path: str) -> None:
    """Remove what its writer needs no more; where that fails it is logged and left for ``gc``."""
    try:
        storage.remove_tree(path)
    except OSError as error:
        logger.warning("%s: left for gc: %s", path, error)
