"""Storage on a POSIX file system: files flushed to the device, records created by a hard link."""

import errno
import hashlib
import os
import resource
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.base.failpoints import pass_step
from pipeline.base.lru_cache import LruCache
from pipeline.base.whole_file import flush_to_device, sync_path
from pipeline.storage.interface import (
    Memory,
    NewFile,
    Scatter,
    StorageError,
    Upload,
    check_path,
)

_MAX_MEMORIES = 1024  # of one system call: IOV_MAX of Linux and macOS
_OPEN_FILES = 2048  # kept open by read_into: an open costs a fifth of a chunk, on NFS a lot more
_OPEN_SHARE = 4  # at most one in so many of the files that the process may hold open are ours
# What link(2) answers on a file system without hard links. EMLINK: a file has one name only.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_CHECK_S = 1.0  # how often an open file is checked to still have its name


class DurableFile(NewFile):
    """A new file on disk, which ``close`` flushes to the device."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("xb")

    def _append(self, data: bytes | memoryview) -> None:
        with self._naming():
            self._file.write(data)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Name the file in the system's errors, which name none that is open."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or self._file.name
            raise

    def close(self) -> None:
        """Flush to the device and close; closed too where that fails."""
        if not self._file.closed:
            try:
                with self._naming():
                    self._file.flush()
                    flush_to_device(self._file.fileno())
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Close without flushing, even what is buffered, which may not fit on the disk."""
        self._file.raw.close()


class _OpenFile:
    """A descriptor to read from, closed with its last reference."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.checked_s = time.monotonic()

    def __del__(self) -> None:
        with suppress(AttributeError):  # where it could not be opened
            os.close(self.descriptor)


class LocalStorage:
    """A folder on a POSIX file system that has hard links (ext4, xfs, NFS, Lustre, tmpfs)."""

    create_needs = "a folder that may be written, on a file system with hard links"

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = str(self.root)
        self._opened: LruCache[str, _OpenFile] = LruCache(_OPEN_FILES)  # pickled without its files

    @property
    def reads_at_once(self) -> int:
        """Up to 4: system calls overlap, the checksums between them do not."""
        known = hasattr(os, "sched_getaffinity")  # Linux: the cores that this process may use
        return min(4, len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1)

    def local_path(self, path: str) -> Path:
        """Return the absolute path of a file of the store."""
        return self.root / check_path(path)

    def exists(self, path: str) -> bool:
        """Return whether a file is there."""
        return self.local_path(path).is_file()

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""
        return self.local_path(path).read_bytes()

    def read_range(self, path: str, start: int, num_bytes: int) -> bytes:
        """Return bytes [start, start + num_bytes) of a file, fewer only at its end.

        A memory map would be no faster, and would kill the process (SIGBUS) if the file is cut.
        """
        with self.local_path(path).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), num_bytes, start)

    def read_tail(self, path: str, num_bytes: int) -> tuple[bytes, int]:
        """Return a file's last bytes, fewer where it has fewer, and its size in bytes."""
        with self.local_path(path).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            return os.pread(file.fileno(), num_bytes, max(0, size - num_bytes)), size

    def read_into(self, path: str, parts: Sequence[Scatter]) -> bool:
        """Read ranges of a file, by a system call each; False if the file ends inside one."""
        file = self._open(path)
        for start, memories in parts:  # noqa: SIM110 - a generator costs as much as all else here
            if not _fill(file.descriptor, start, memories):
                return False
        return True

    def _open(self, path: str) -> "_OpenFile":
        """Return a file open for reading: the one opened before, if it still has its name.

        This is checked once a second, since it costs a twentieth of a chunk. Until then, what is
        read of a removed file is what was committed, or fails its checksum.
        """
        file = self._opened.get_or_make(path, lambda: self._open_anew(path))
        now = time.monotonic()
        if now - file.checked_s > _CHECK_S:
            file.checked_s = now
            if os.fstat(file.descriptor).st_nlink == 0:  # removed, or another put in its place
                self._opened.remove(path)
                file = self._opened.get_or_make(path, lambda: self._open_anew(path))
        return file

    def _open_anew(self, path: str) -> "_OpenFile":
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit != resource.RLIM_INFINITY:
            self._opened.max_cost = min(_OPEN_FILES, limit // _OPEN_SHARE)
        target = f"{self.url}/{check_path(path)}"  # a Path costs 10 us to make
        try:
            return _OpenFile(target)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
        self._opened.clear()  # the process has too many open files, perhaps these
        return _OpenFile(target)

    def release(self) -> None:
        """Close the files that reading keeps open; later reads open them anew."""
        self._opened.clear()

    def size(self, path: str) -> int:
        """Return a file's size in bytes."""
        return self.local_path(path).stat().st_size

    def find_time(self, path: str) -> float | None:
        """Return a file's mtime, seconds since the epoch, or None if it is gone."""
        try:
            return self.local_path(path).stat().st_mtime
        except FileNotFoundError:
            return None

    def list_times(self, folder: str) -> dict[str, float]:
        """Return nothing: each time would take a system call."""
        check_path(folder)
        return {}

    def list_names(self, folder: str | None = None) -> Iterator[str]:
        """Yield the names in a folder; see ``Storage``."""
        try:
            with os.scandir(self._folder(folder)) as entries:
                for entry in entries:
                    yield entry.name
        except FileNotFoundError:
            return

    def list_files(self, folder: str | None = None) -> Iterator[tuple[str, int]]:
        """Yield (path in the store, bytes) of every file below a folder; follows no links."""
        for below, _, names in os.walk(self._folder(folder), onerror=_raise_unless_gone):
            for name in names:
                path = Path(below) / name
                try:
                    num_bytes = path.lstat().st_size
                except FileNotFoundError:  # removed meanwhile
                    continue
                yield path.relative_to(self.root).as_posix(), num_bytes

    def _folder(self, folder: str | None) -> Path:
        return self.root if folder is None else self.local_path(folder)

    def open_write(self, path: str) -> DurableFile:
        """Open a new file to write it once; its folders are made."""
        target = self.local_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        return DurableFile(target)

    def digest(self, path: str) -> tuple[int, str]:
        """Read a file back and return its size in bytes and its SHA-256 in hex."""
        with self.local_path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return os.fstat(file.fileno()).st_size, digest

    def sync_folders(self, folder: str) -> None:
        """Flush the names in a folder, in every folder below and in those above it."""
        top = self.local_path(folder)
        for below, _, _ in os.walk(top):
            sync_path(Path(below))
        self._sync_above(top)

    def _sync_above(self, path: Path) -> None:
        for above in path.parents:
            if not above.is_relative_to(self.root):
                break
            sync_path(above)

    def remove_tree(self, path: str) -> None:
        """Remove a file, or a folder and all below it."""
        target = self.local_path(path)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target, onerror=lambda call, name, found: _raise_unless_gone(found[1]))
        else:
            target.unlink(missing_ok=True)

    def list_uploads(self, folder: str) -> Iterator[Upload]:
        """Return none: a file that was begun is there under its name."""
        return iter(())

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file if and only if there is none; return False if there is one already.

        A temporary file is written, flushed, and linked under the name, in which one of any number
        of racers succeeds; then the folders above are flushed, since any of them may be new.
        """
        target = self.local_path(path)
        with _write_beside(target, data) as temporary:
            pass_step("record.written")
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                reason = f"its file system makes no hard links ({error.strerror})"
                raise StorageError(f"{target}: could not be created: {reason}") from error
        pass_step("record.created")
        self._sync_above(target)
        return True

    def write_content(self, path: str, data: bytes) -> None:
        """Write a small file named by its content, by a rename; see ``Storage``."""
        target = self.local_path(path)
        if target.is_file():
            return
        with _write_beside(target, data) as temporary:
            temporary.replace(target)
        self._sync_above(target)


@contextmanager
def _write_beside(target: Path, data: bytes) -> Iterator[Path]:
    """Write and flush a temporary file in the folder of ``target``, which is made; remove it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}"
    try:
        with DurableFile(temporary) as file:
            file.write(data)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _fill(descriptor: int, start: int, memories: Sequence[Memory]) -> bool:
    """Fill memories with a file's bytes from ``start`` on; False if it ends before."""
    if len(memories) <= _MAX_MEMORIES:
        num_bytes = _preadv(descriptor, memories, start)
        if num_bytes == sum(map(len, memories)):  # nearly always: the kernel stops at 2 GiB
            return True
    for first in range(0, len(memories), _MAX_MEMORIES):
        left = [memoryview(memory) for memory in memories[first : first + _MAX_MEMORIES]]
        while left:
            num_bytes = _preadv(descriptor, left, start)
            if num_bytes == 0:
                return sum(map(len, left)) == 0
            start += num_bytes
            while left and num_bytes >= len(left[0]):
                num_bytes -= len(left.pop(0))
            if num_bytes:
                left[0] = left[0][num_bytes:]
    return True


def _preadv(descriptor: int, memories: Sequence[Memory], start: int) -> int:
    """Read as ``os.preadv``, which macOS has from version 11 on only."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, memories, start)
    num_bytes = 0
    for memory in memories:
        data = os.pread(descriptor, len(memory), start + num_bytes)
        memory[: len(data)] = data
        num_bytes += len(data)
        if len(data) < len(memory):
            break
    return num_bytes


def _raise_unless_gone(error: BaseException) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
