"""Where a command may write, checked before its work begins."""

import os
import re
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path

from pipeline.base.job_copy import is_in_job_copy

_URL = re.compile(r"[a-z][a-z0-9+.-]+:/")  # pathlib makes one slash of two


def check_outlives_job(option: str, location: str | Path) -> None:
    """Refuse a place in a Ray job's copy of the working directory, which Ray deletes after the job.

    A ``str`` may be a URL, a ``Path`` may not.

    Raises:
        ValueError: ``location`` lies in that copy, or is a ``Path`` that was given as a URL.
    """
    if isinstance(location, Path) and _URL.match(str(location)):
        url = str(location).replace(":/", "://", 1)
        raise ValueError(
            f"{option}: expected a path of a file system, got the URL {url}; only a store and "
            "a corpus may be on S3"
        )
    if is_in_job_copy(location):
        url = "" if isinstance(location, Path) else "s3://… or "
        raise ValueError(
            f"{option}: expected {url}an absolute path that outlives the job, got {location}, "
            "which is in the job's own copy of the working directory: Ray deletes it"
        )


def _find_there(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists."""
    return next(above for above in (path, *path.absolute().parents) if above.exists())


def check_writable(option: str, path: Path) -> None:
    """Refuse a file that could not be written at the end of the work; nothing is created.

    Raises:
        ValueError: ``path`` is a folder, its folder cannot be made, or access is denied.
    """
    there = _find_there(path)
    fits = there.is_file() if there == path else there.is_dir()
    if not fits or not os.access(there, os.W_OK):
        denied = "is not to be written to" if fits else "is in the way"
        raise ValueError(
            f"{option}: expected a file that can be written, got {path}: {there} {denied}"
        )


def check_picture(option: str, path: Path, *others: Path | None) -> None:
    """Refuse a PNG that could not be written, has another suffix, or is one of the other files.

    Raises:
        ValueError: as ``check_writable``, or it is so.
    """
    check_outlives_job(option, path)
    check_writable(option, path)
    for other in others:
        if other is not None and (
            path.resolve() == other.resolve()
            or (path.exists() and other.exists() and path.samefile(other))
        ):
            raise ValueError(
                f"{option}: {path} is the same file as {other}, which would be lost; give another"
            )
    if path.suffix.lower() != ".png":
        raise ValueError(f"{option}: a PNG is written; expected a name in .png, got {path}")


def check_folder(
    option: str,
    path: Path,
    *,
    store: str | None = None,
    own: Collection[str] = (),
    foreign: Collection[str] = (),
) -> None:
    """Refuse a folder in which a run could not write its results, or not without harm.

    Nothing is created. A folder with one of the names ``own`` is a run's, and is not asked further;
    one with a name of ``foreign``, or with steps' folders, is of a run of another kind.

    Raises:
        ValueError: it is a file or a URL, cannot be made or written to, is of another run, lies in
            the ``store`` or the store in it, or is the current folder, or one above it, with other
            files.
    """
    from pipeline.storage.local import LocalStorage  # not for --help
    from pipeline.storage.open import open_storage

    check_outlives_job(option, path)
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{option}: {path} is a link to {path.readlink()}, which is not there")
    there = _find_there(path)
    if not there.is_dir() or not os.access(there, os.W_OK):
        denied = "is not to be written to" if there.is_dir() else "is a file"
        raise ValueError(
            f"{option}: expected a folder that can be written to, got {path}: {there} {denied}"
        )
    place = path.resolve()
    left = {found.name for found in place.iterdir()} if there == path else set()
    if of_another := sorted(x for x in left if x in foreign or x.startswith("step-")):
        raise ValueError(
            f"{option}: expected a folder for the results alone, got {path}, which has "
            f"{of_another[0]} of another run; give a new folder's name"
        )
    if left & set(own):
        return
    storage = None if store is None else open_storage(store)
    if isinstance(storage, LocalStorage):
        other = storage.root.resolve()
        if place.is_relative_to(other) or other.is_relative_to(place):
            raise ValueError(
                f"{option}: expected a folder apart from the store, got {path}, and the store is "
                f"{store}: what is removed of one would be of both"
            )
    if left and Path.cwd().is_relative_to(place):
        raise ValueError(
            f"{option}: expected a folder for the results alone, got {path}, where there are "
            f"{len(left)} other files, such as {min(left)}; give a new folder's name"
        )


def choose_metrics(verb: str, given: Path | None) -> Path:
    """Return where a run writes metrics.jsonl: the path given, or one below ``ldznet-runs``.

    Raises:
        ValueError: it would be deleted with a Ray job, or cannot be written.
    """
    if given is not None:
        check_outlives_job("--metrics", given)
    started = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = given or Path("ldznet-runs") / f"{verb}-{started}" / "metrics.jsonl"
    check_writable("--metrics", path)
    return path
