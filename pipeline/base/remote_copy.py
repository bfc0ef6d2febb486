"""Copies remote files to this machine, through outages, with a check of free space and progress.

Failures that may pass (a reset, a time-out, a 503, a copy cut short) are outages, which the
process's patience rides out; a missing file, a denied access or a full disk is not.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.callbacks import Callback

from pipeline.base.node_fault import SHORT, NodeError, blaming_node, check_folder
from pipeline.base.outages import PATIENCE, OutageError
from pipeline.base.secrets import strip_url

try:  # fsspec's http uses it; it need not be installed
    from aiohttp import ClientTimeout

    # By default aiohttp ends every request after 300 s, too early for a tar of 10 GB.
    _HTTP: dict[str, Any] = {
        "client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}
    }
except ImportError:
    _HTTP = {}

_FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# As s3fs gives refusals that a second try would get too: 301, 400, 405, 412, 416, 501.
_REFUSED = (
    *(errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG),
    getattr(errno, "EREMCHG", errno.EINVAL),  # of Linux
)
_MAY_PASS = (408, 425, 429)  # of the statuses from 400 to 499

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
    of_botocore = getattr(filesystem, "config_kwargs", None)  # s3fs', before its first request
    if isinstance(of_botocore, dict):  # whose own tries would hide an outage for a minute
        of_botocore.setdefault("retries", {"total_max_attempts": 1})
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
        # Only type and status are shown: a library's text may quote a signed request.
        status = _find_status(error)
        said = " ".join([type(error).__name__, *([str(status)] if status else [])])
        what = f"{strip_url(url)}: could not be read: {said}"
        if status in (401, 403):
            raise PermissionError(what) from error
        if status is not None and 400 <= status < 500 and status not in _MAY_PASS:
            raise OSError(errno.EINVAL, what) from error
        raise OutageError.because(said, what) from error


def _find_status(error: Exception) -> int | None:
    """Return the HTTP status of a library's error, by aiohttp's, azure's or gcsfs' name for it."""
    found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((status for status in found if isinstance(status, int)), None)


def _describe(error: OSError) -> str:
    """Return an error in a few words, without a server's text, which may quote a request.

    s3fs raises OSError from botocore's error, which has the status and S3's code.
    """
    answer = getattr(error.__cause__, "response", None)
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", "")
        return f"HTTP {status} {str(answer.get('Error', {}).get('Code', ''))[:80]}".strip()
    if type(error) is OSError and error.errno is not None:
        return os.strerror(error.errno)
    return type(error).__name__


def retry(action: Callable[[], T], *, what: str) -> T:
    """Return ``action()``, called again while it fails in a way that may pass and patience lasts.

    ``what`` is the URL that is read.

    Raises:
        FileNotFoundError, PermissionError: at once.
        OSError: at once if the server refuses, or this machine is short of something.
        OutageError: patience has ended.
    """

    def try_once() -> T:
        try:
            return action()
        except OutageError:
            raise
        except OSError as error:
            if isinstance(error, _FINAL_ERRORS) or error.errno in (*SHORT, *_REFUSED):
                raise
            said = _describe(error)
            raise OutageError.because(
                said, f"{strip_url(what)}: could not be read: {said}"
            ) from error

    return PATIENCE.ride_out(try_once, url=what)


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
    """Copy a file that is listed with ``num_bytes`` into an open one in ``folder``.

    ``file`` needs no name, so that a killed process leaves none. Whatever it held is gone, and its
    position is its start. A source that has another size by now is copied all the same, for the
    caller to refuse.

    Raises:
        OSError: it could not be read, or there is no room for it; says which file and where. As
            ``retry``.
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
                what = f"expected {num_bytes} bytes as listed, got a copy of {got}"
                raise OutageError.because(what, f"{url}: {what}")

    try:
        with blaming_node(folder, num_bytes=num_bytes):
            retry(copy, what=url)
    except NodeError:
        check_room(folder, num_bytes, what=url)
        raise
    file.seek(0)


def check_room(folder: Path, num_bytes: int, *, what: str) -> None:
    """Raise NodeError with ENOSPC if a folder's file system has no room for a copy of ``what``."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes:
        raise NodeError(
            errno.ENOSPC,
            f"{what}: expected room for a local copy of {num_bytes} bytes in {folder}, got "
            f"{free_bytes} bytes free; name a folder on a larger disk by TMPDIR (tars) or "
            "LDZNET_CACHE (models), or use fewer actors a node",
            check=lambda: check_folder(folder, num_bytes),
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
