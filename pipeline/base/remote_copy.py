"""Copies remote files to this machine, with bounded retries, a check of free space, and progress.

Failures that may pass (a reset, a time-out, a 503, a copy cut short) are retried with capped,
random pauses; a missing file, a denied access or a full disk is not.
"""

import errno
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.callbacks import Callback

from pipeline.base.secrets import strip_url

try:  # fsspec's http uses it; it need not be installed
    from aiohttp import ClientTimeout

    # By default aiohttp ends every request after 300 s, too early for a tar of 10 GB.
    _HTTP: dict[str, Any] = {
        "client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}
    }
except ImportError:
    _HTTP = {}

logger = logging.getLogger(__name__)
NUM_TRIES = 4
FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 10.0
_FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)

# Errors of these packages are bugs; those of all others come from fsspec's libraries.
_NOT_REMOTE = frozenset({"builtins", "pipeline", "models", "jobs"})
T = TypeVar("T")
OnBytes = Callable[[int], None]
"""Called with the number of bytes that came since the last call; 0 is a sign of life."""


def open_filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path in it.

    Raises:
        ImportError: the package that reads the scheme is not installed.
        ValueError: there is no such scheme.
    """
    options = _HTTP if url.startswith(("http://", "https://")) else {}
    filesystem, path = fsspec.url_to_fs(url, **options)
    return filesystem, path


@contextmanager
def as_oserror(url: str) -> Iterator[None]:
    """Raise errors of fsspec's libraries (aiohttp, botocore, gcsfs, …) as OSError with the URL.

    Which of them are installed is not known here, so every exception that is neither Python's nor
    of this project counts as one.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if type(error) is not Exception and type(error).__module__.split(".")[0] in _NOT_REMOTE:
            raise
        # Only its type is shown: a library's text may quote a signed request.
        kind = PermissionError if _find_status(error) in (401, 403) else OSError
        raise kind(f"{strip_url(url)}: could not be read: {type(error).__name__}") from error


def _find_status(error: Exception) -> int | None:
    """Return the HTTP status of a library's error, by aiohttp's, azure's or gcsfs' name for it."""
    found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((status for status in found if isinstance(status, int)), None)


def retry(action: Callable[[], T], *, what: str) -> T:
    """Return ``action()``, tried up to ``NUM_TRIES`` times.

    Raises:
        FileNotFoundError, PermissionError: at once.
        OSError: at once if a disk is full, else after the last try.
    """
    for num_failed in range(1, NUM_TRIES):
        try:
            return action()
        except OSError as error:
            if isinstance(error, _FINAL_ERRORS) or error.errno in _FULL_DISK:
                raise
            pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 4 ** (num_failed - 1))
            pause_s *= random.uniform(0.5, 1)  # not all actors that met a 503 at the same moment
            logger.warning(
                "%s: try %d of %d failed, the next in %.1f s: %s",
                *(what, num_failed, NUM_TRIES, pause_s, type(error).__name__),
            )
            time.sleep(pause_s)
    return action()


def copy_file(
    filesystem: AbstractFileSystem,
    path: str,
    file: BinaryIO,
    *,
    folder: Path,
    url: str,
    num_bytes: int,
    on_bytes: OnBytes | None = None,
) -> None:
    """Copy a file that is listed with ``num_bytes`` into an open one in ``folder``, with retries.

    ``file`` needs no name, so that a killed process leaves none. Whatever it held is gone, and its
    position is its start. A source that has another size by now is copied all the same, for the
    caller to refuse.

    Raises:
        OSError: it could not be read, or there is no room for it; says which file and where.
    """
    check_room(folder, num_bytes, what=url)

    def copy() -> None:
        file.seek(0)
        file.truncate()  # what an earlier try has left, which macOS' /dev/fd would keep
        with as_oserror(url):
            # By a path, since most of fsspec's libraries take no open file.
            target = f"/dev/fd/{file.fileno()}"
            filesystem.get_file(path, target, callback=_Progress(on_bytes))
        got = os.fstat(file.fileno()).st_size
        if got < num_bytes:  # perhaps an answer cut short, which not every library notices
            filesystem.invalidate_cache()
            with as_oserror(url):
                size = filesystem.info(path)["size"]
            if size == num_bytes:
                raise OSError(f"{url}: expected {num_bytes} bytes as listed, got a copy of {got}")

    try:
        retry(copy, what=url)
    except OSError as error:
        if error.errno in _FULL_DISK:
            check_room(folder, num_bytes, what=url)
        raise
    file.seek(0)


def check_room(folder: Path, num_bytes: int, *, what: str) -> None:
    """Raise OSError with ENOSPC if a folder's file system has no room for a copy of ``what``."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{what}: expected room for a local copy of {num_bytes} bytes in {folder}, got "
            f"{free_bytes} bytes free; name a folder on a larger disk by TMPDIR (tars) or "
            "LDZNET_CACHE (models), or use fewer actors a node",
        )


class _Progress(Callback):
    """Calls ``OnBytes`` from fsspec's callback, whether a library adds to its value or sets it."""

    def __init__(self, on_bytes: OnBytes | None) -> None:
        super().__init__()
        self._on_bytes = on_bytes
        self._told = 0

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        """Report the bytes since the last call."""
        if self._on_bytes is not None:
            self._on_bytes(self.value - self._told)
            self._told = self.value
