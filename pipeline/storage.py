"""The files of a store: durable writes, create-only records, and paths that stay inside.

One small class a kind of storage; this one is a local or network POSIX file system. Everything
above it names files by POSIX paths relative to the store.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from urllib.parse import unquote, urlsplit


class StorageError(OSError):
    """The storage refused or failed something, with what and where."""


class UnsafePathError(ValueError):
    """A path that would leave the store."""


def check_path(path: str) -> str:
    """Return ``path`` if it is a plain relative POSIX path inside the store.

    Raises:
        UnsafePathError: absolute, empty, with ``..``, a backslash or a NUL.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise UnsafePathError(f"expected a relative path inside the store, got {path!r}")
    return path


class DurableFile:
    """A file being written once, front to back, its SHA-256 taken on the way.

    ``close`` flushes it to the device. Leaving the ``with`` block by an error closes it without.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data) if isinstance(data, bytes) else data.nbytes

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Flush to the device and close."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def abandon(self) -> None:
        """Close without flushing to the device."""
        self._file.close()

    def __enter__(self) -> "DurableFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


class LocalStorage:
    """A folder on a POSIX file system that has hard links (ext4, xfs, NFS, Lustre, tmpfs)."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def url(self) -> str:
        """The folder's path."""
        return str(self.root)

    def local_path(self, path: str) -> Path:
        """Return where ``path`` lies on this machine."""
        return self.root / check_path(path)

    def exists(self, path: str) -> bool:
        """Tell whether a file or folder is there."""
        return self.local_path(path).exists()

    def read(self, path: str) -> bytes:
        """Return a file's bytes.

        Raises:
            FileNotFoundError: no such file.
        """
        return self.local_path(path).read_bytes()

    def read_range(self, path: str, start: int, num_bytes: int) -> bytes:
        """Return bytes [start, start + num_bytes) of a file, fewer where it ends before.

        The file is opened each time: a store has more shards than a process may hold open, and
        an open costs 5 us beside 40 for a chunk. A map would do no better, and would kill the
        process (SIGBUS) where the file is cut meanwhile.

        Raises:
            FileNotFoundError: no such file.
        """
        with self.local_path(path).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), num_bytes, start)

    def size(self, path: str) -> int:
        """Return a file's size in bytes.

        Raises:
            FileNotFoundError: no such file.
        """
        return self.local_path(path).stat().st_size

    def list_names(self, folder: str | None = None) -> Iterator[str]:
        """Yield the names in a folder (None: the store's own), in no order; none without it."""
        try:
            with os.scandir(self.local_path(folder) if folder else self.root) as entries:
                for entry in entries:
                    yield entry.name
        except FileNotFoundError:
            return

    def open_write(self, path: str) -> DurableFile:
        """Open a new file for writing once; its folders are made.

        Raises:
            FileExistsError: the file is there.
        """
        target = self.local_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        return DurableFile(target)

    def digest(self, path: str) -> tuple[int, str]:
        """Read a file back and return its size in bytes and its SHA-256 in hex."""
        with self.local_path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return os.fstat(file.fileno()).st_size, digest

    def sync_folders(self, folder: str) -> None:
        """Flush the entries of a folder, of every folder below and of those above it."""
        top = self.local_path(folder)
        for below, _, _ in os.walk(top):
            sync_folder(Path(below))
        self._sync_above(top)

    def _sync_above(self, path: Path) -> None:
        for above in path.parents:
            if not above.is_relative_to(self.root):
                break
            sync_folder(above)

    def remove_tree(self, folder: str) -> None:
        """Remove a folder and all below it; what is not there is fine."""
        shutil.rmtree(self.local_path(folder), ignore_errors=True)

    def create(self, path: str, data: bytes) -> bool:
        """Write a whole file if and only if none is there; False where there is one already.

        A temporary file is written and flushed, then linked under its name, which one of any
        number of racers can do; then the folders above are flushed, of which any may be new. The
        file is never seen half written.
        """
        target = self.local_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}"
        try:
            with DurableFile(temporary) as file:
                file.write(data)
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        self._sync_above(target)
        return True


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the device."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_storage(url: str) -> LocalStorage:
    """Return the storage at a store's URL: a path or a ``file://`` URL.

    Raises:
        ValueError: no path, or a URL that this version does not write to.
    """
    parts = urlsplit(url)
    if "::" in url or parts.scheme not in ("", "file"):
        raise ValueError(
            f"store: expected a local path or a file:// URL, got one of scheme {parts.scheme!r}; "
            "this version commits to POSIX file systems only"
        )
    path = unquote(parts.path) if parts.scheme else url
    if not path or (parts.scheme and (parts.netloc or parts.query or parts.fragment)):
        raise ValueError(f"store: expected a path or file:///path, got {url!r}")
    return LocalStorage(Path(path).expanduser())
