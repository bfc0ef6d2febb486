"""Folders of a training's steps, ``step-000200``: whole under their names, whenever a kill comes.

One is written under another name and renamed. One whose step is there already gives it way under a
``REPLACED`` name, by which it is found until the new one has its place.
"""

import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.new_folder import write_new_folder
from pipeline.base.failpoints import pass_step
from pipeline.base.whole_file import sync_path

REPLACED = ".old-"  # before its name: a folder whose successor of the same step comes
_NAME = re.compile(rf"(?:{re.escape(REPLACED)})?step-(\d{{6,}})")


def name_step(step: int) -> str:
    """Return the name of a step's folder."""
    return f"step-{step:06d}"


def list_step_folders(above: Path) -> list[Path]:
    """Return the steps' folders in ``above``, oldest first.

    One that was about to be replaced when its writer was killed counts, under the name it has.
    """
    named = [*above.glob(f"{REPLACED}step-*"), *above.glob("step-*")]
    found = {find_step(path): path for path in named if _NAME.fullmatch(path.name)}
    return [found[step] for step in sorted(found)]


def find_step(folder: Path) -> int:
    """Return the step of one of ``list_step_folders``."""
    return int(folder.name.rpartition("-")[2])


def publish_folder(written: Path, folder: Path) -> None:
    """Give a folder its name; one that has it keeps another until that is on disk."""
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
    """Yield a folder to write into, which takes ``folder``'s place when it is whole.

    What a run that was killed left in the same place goes first: one run at a time writes there.
    """
    written = folder.with_name(f".new-{folder.name}")
    for left in (written, *folder.parent.glob("..new-*")):
        shutil.rmtree(left, ignore_errors=True)
    with write_new_folder(written) as new:
        yield new
    publish_folder(written, folder)


def restore_replaced(above: Path) -> list[Path]:
    """Give folders their names back whose successors a kill kept from taking them; return them."""
    restored = []
    for replaced in above.glob(f"{REPLACED}step-*"):
        folder = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if not folder.exists():
            replaced.rename(folder)
            restored.append(folder)
    return restored


def remove_folder(folder: Path) -> None:
    """Remove a step's folder: in one step for whoever looks, then its files."""
    hidden = folder.with_name(f".removed-{folder.name.lstrip('.')}-{secrets.token_hex(4)}")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
