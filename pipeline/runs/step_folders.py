"""Folders of a run's steps, such as ``step-000200``, each written whole and then renamed.

A folder that is replaced is first renamed with the prefix ``REPLACED``, under which it is still
found, until the new one has its name. So a kill at any time leaves whole folders.
"""

import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.base.failpoints import pass_step
from pipeline.base.whole_file import sync_path, write_new_folder

REPLACED = ".old-"  # prefix of a folder that is being replaced by one of the same step
_NAME = re.compile(rf"(?:{re.escape(REPLACED)})?step-(\d{{6,}})")


def name_step(step: int) -> str:
    """Return the name of a step's folder."""
    return f"step-{step:06d}"


def list_step_folders(above: Path) -> list[Path]:
    """Return the steps' folders in ``above``, oldest first.

    A folder that was being replaced when its writer was killed is one, if the new one is missing.
    """
    named = [*above.glob(f"{REPLACED}step-*"), *above.glob("step-*")]
    found = {parse_step(path): path for path in named if _NAME.fullmatch(path.name)}
    return [found[step] for step in sorted(found)]


def parse_step(folder: Path) -> int:
    """Return the step in a folder's name."""
    return int(folder.name.rpartition("-")[2])


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
