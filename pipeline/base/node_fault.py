"""Faults of this machine: no room, no process, no GPU. They say nothing about what was read."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
SHORT = NO_ROOM | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
PROBE_BYTES = 2**20  # written to see whether a folder takes files again


class NodeError(OSError):
    """This machine cannot do it; another may. ``check`` raises while that is still so."""

    def __init__(
        self, code: int | None, text: str, *, check: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(*([] if code is None else [code]), text)
        self.check = check


@contextmanager
def blaming_node(folder: Path, *, num_bytes: int = PROBE_BYTES) -> Iterator[None]:
    """Raise an OSError that is this machine's, or about a file in ``folder``, as NodeError.

    The machine is sound again once ``folder`` takes a file of ``num_bytes``.
    """
    try:
        yield
    except NodeError:
        raise
    except OSError as error:
        path = error.filename if isinstance(error.filename, str) else ""
        if error.errno not in SHORT and not Path(path).is_relative_to(folder):
            raise
        text = f"{error.strerror or error}: in {folder}"
        raise NodeError(error.errno, text, check=lambda: check_folder(folder, num_bytes)) from error


def check_folder(folder: Path, num_bytes: int) -> None:
    """Raise OSError unless a folder has room for so many bytes, and takes a file."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes:
        text = f"expected room for {num_bytes} bytes in {folder}, got {free_bytes} bytes free"
        raise OSError(errno.ENOSPC, text)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(min(num_bytes, PROBE_BYTES)))
        file.flush()
        os.fsync(file.fileno())
