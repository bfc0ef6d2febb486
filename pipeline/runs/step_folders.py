"""Folders of a run's steps, such as ``step-000200``, each written whole and then renamed.

A folder that is replaced is first renamed with the prefix ``REPLACED``, under which it is still
found, until the new one has its name. So a kill at any time leaves whole folders. A reader that
met a removal or a replacement reads again (``read_steady``).
"""

import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pipeline.base.failpoints import pass_step
from pipeline.base.whole_file import sync_path, write_new_folder

T = TypeVar("T")
_MAX_TRIES = 100  # of a reader: a writer replaces a folder in the middle of a few of them
REPLACED = ".old-"  # prefix of a folder that is being replaced by one of the same step
_NAME = re.compile(rf"(?:{re.escape(REPLACED)})?step-(\d{{6,}})")


def name_step(step: int) -> str:
    """Return the name of a step's folder."""
    return f"step-{step:06d}"


def list_step_folders(above: Path) -> list[Path]:
    """Return the steps' folders in ``above``, oldest first.

    A folder that was being replaced when its writer was killed is one, if the new one is missing.
    """
    named = sorted(above.glob("*step-*"))  # one listing, or a folder is renamed between two
    found = {parse_step(path): path for path in named if _NAME.fullmatch(path.name)}
    return [found[step] for step in sorted(found)]


def parse_step(folder: Path) -> int:
    """Return the step in a folder's name."""
    return int(folder.name.rpartition("-")[2])


def follow(folder: Path) -> Path:
    """Return where a step's folder is: what a link leads to, or one that is being replaced."""
    if folder.is_symlink():
        return folder.resolve()
    if folder.exists() or not _NAME.fullmatch(folder.name):
        return folder
    same = (path for path in list_step_folders(folder.parent) if path.name.endswith(folder.name))
    return next(same, folder)


def read_steady(find: Callable[[], Path], read: Callable[[Path], T]) -> T:
    """Return ``read(find())``, again where a writer removed or replaced the folder meanwhile.

    What ``read`` raises of a folder that is still there and the same is raised at once.
    """
    for tries_left in reversed(range(_MAX_TRIES)):
        folder = find()
        before = _identify(folder)
        try:
            found = read(folder)
        except Exception:
            there = find()
            if not tries_left or (there, _identify(there)) == (folder, before):
                raise
        else:
            if not tries_left or _identify(folder) == before:
                return found
    raise AssertionError


def _identify(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns  # an inode may be used again


def publish_folder(written: Path, folder: Path) -> None:
    """Rename ``written`` to ``folder``, replacing a folder of that name."""
    replaced = folder.with_name(f"{REPLACED}{folder.name}")
    if folder.exists():
        folder.rename(replaced)
        pass_step("checkpoint.replaced")
    written.rename(folder)
    sync_path(folder.parent)
    if replaced.exists():
        remove_folder(replaced)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into, renamed to ``folder`` when the block ends.

    Removes what a killed run left there: only one run at a time may write.
    """
    written = folder.with_name(f".new-{folder.name}")
    for left in (written, *folder.parent.glob("..new-*")):
        shutil.rmtree(left, ignore_errors=True)
    with write_new_folder(written) as new:
        yield new
    publish_folder(written, folder)


def restore_replaced(above: Path) -> None:
    """Rename back the folders whose replacement was never finished."""
    for replaced in above.glob(f"{REPLACED}step-*"):
        folder = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if not folder.exists():
            replaced.rename(folder)


def remove_folder(folder: Path) -> None:
    """Remove a step's folder: rename it, so that it is gone at once, and delete its files."""
    hidden = folder.with_name(f".removed-{folder.name.lstrip('.')}-{secrets.token_hex(4)}")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
