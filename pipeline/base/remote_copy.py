"""Local copies of remote files: checked URLs, bounded retries, room asked for first, progress told.

What fails and may pass (a reset, a time-out, a 503, a copy cut short) is tried again with capped,
random pauses; what is denied, absent or for want of room is not.
"""

import errno
import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.callbacks import Callback

from pipeline.base.secrets import strip_url

try:  # what fsspec's http reads by; it need not be installed
    from aiohttp import ClientTimeout

    # aiohttp ends every request after 300 s in all, which a tar of 10 GB does not meet.
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

# The packages whose errors are our own, or a programmer's; all others are a library's.
_NOT_REMOTE = frozenset({"builtins", "pipeline", "models", "jobs"})
T = TypeVar("T")
OnBytes = Callable[[int], None]


"""Called with the number of bytes that came since the last call; 0 is a sign of life."""


def open_filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path in it.

    Raises:
        ImportError, ValueError: no package at hand reads the scheme, or there is no such scheme.
    """
    options = _HTTP if url.startswith(("http://", "https://")) else {}
    filesystem, path = fsspec.url_to_fs(url, **options)
    return filesystem, path


@contextmanager
def as_oserror(url: str) -> Iterator[None]:
    """Turn the errors of fsspec's libraries that are no OSError into one that says which file.

    Each library has exceptions of its own (aiohttp's, botocore's, gcsfs' HttpError, azure's), and
    which are installed is not ours to know: any that is neither Python's nor ours is taken for one.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if type(error) is not Exception and type(error).__module__.split(".")[0] in _NOT_REMOTE:
            raise
        # Only the kind: a library's text may quote a signed request.
        kind = PermissionError if _find_status(error) in (401, 403) else OSError
        raise kind(f"{strip_url(url)}: could not be read: {type(error).__name__}") from error


def _find_status(error: Exception) -> int | None:
    """The HTTP status of a library's error: aiohttp's name for it, azure's, gcsfs'."""
    found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((status for status in found if isinstance(status, int)), None)


def retry(action: Callable[[], T], *, what: str) -> T:
    """Return what ``action`` returns, tried up to ``NUM_TRIES`` times while it may yet pass.

    Raises:
        FileNotFoundError, PermissionError: at once.
        OSError: for want of room at once, else after the last try.
    """
    for num_failed in range(1, NUM_TRIES):
        try:
            return action()
        except OSError as error:
            if isinstance(error, _FINAL_ERRORS) or error.errno in _FULL_DISK:
                raise
            pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 4 ** (num_failed - 1))
            pause_s *= random.uniform(0.5, 1)  # or all actors that one 503 met come back at once
            logger.warning(
                "%s: try %d of %d failed, the next in %.1f s: %s",
                *(what, num_failed, NUM_TRIES, pause_s, type(error).__name__),
            )
            time.sleep(pause_s)
    return action()


def copy_file(
    filesystem: AbstractFileSystem,
    path: str,
    target: Path,
    *,
    url: str,
    num_bytes: int,
    on_bytes: OnBytes | None = None,
) -> None:
    """Copy a file of ``num_bytes`` as listed to ``target`` on this machine, in several tries.

    A file that is of another size than listed is copied all the same: the caller tells that.

    Raises:
        OSError: it could not be read, or there is no room for it; says which file and where.
    """
    check_room(target.parent, num_bytes, what=url)

    def copy() -> None:
        with as_oserror(url):
            filesystem.get_file(path, str(target), callback=_Progress(on_bytes))
        got = target.stat().st_size
        if got < num_bytes:  # an answer cut short, which not every library notices
            filesystem.invalidate_cache()
            with as_oserror(url):
                size = filesystem.info(path)["size"]
            if size == num_bytes:
                raise OSError(f"{url}: expected {num_bytes} bytes as listed, got a copy of {got}")

    try:
        retry(copy, what=url)
    except OSError as error:
        if error.errno in _FULL_DISK:
            check_room(target.parent, num_bytes, what=url)
        raise


def check_room(folder: Path, num_bytes: int, *, what: str) -> None:
    """Check that a folder's file system has room for a copy.

    Raises:
        OSError: with ENOSPC, where it has not; says what, where and how much.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{what}: expected room for a local copy of {num_bytes} bytes in {folder}, got "
            f"{free_bytes} bytes free; name a folder on a larger disk by TMPDIR (tars) or "
            "LDZNET_CACHE (models), or use fewer actors a node",
        )


class _Progress(Callback):
    """fsspec's callback as ``OnBytes``, whether a library counts up or says where it is."""

    def __init__(self, on_bytes: OnBytes | None) -> None:
        super().__init__()
        self._on_bytes = on_bytes
        self._told = 0

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        """Tell what came since the last call."""
        if self._on_bytes is not None:
            self._on_bytes(self.value - self._told)
            self._told = self.value
