"""Where a command may write, checked before its work begins."""

import os
import re
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


def check_writable(option: str, path: Path) -> None:
    """Refuse a file that could not be written at the end of the work; nothing is created.

    Raises:
        ValueError: ``path`` is a folder, its folder cannot be made, or access is denied.
    """
    there = next(above for above in (path, *path.absolute().parents) if above.exists())
    fits = there.is_file() if there == path else there.is_dir()
    if not fits or not os.access(there, os.W_OK):
        denied = "is not to be written to" if fits else "is in the way"
        raise ValueError(
            f"{option}: expected a file that can be written, got {path}: {there} {denied}"
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
