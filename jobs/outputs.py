"""Where a command may write, checked before its work: outliving its job, with nothing in the way.

Without Ray: commands that need none import this.
"""

import os
import re
from pathlib import Path

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what Ray sets for a submitted job
JOB_COPIES = "working_dir_files"  # the folder that it unpacks --working-dir into
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/")  # pathlib makes one slash of two


def check_outlives_job(option: str, location: str | Path) -> None:
    """Refuse to write into a Ray job's copy of the working directory, which Ray deletes after it.

    A ``str`` may be a URL, a ``Path`` may not.

    Raises:
        ValueError: ``location`` is a relative path, or another in that copy; or a path that was
            given as a URL.
    """
    if isinstance(location, Path) and _URL.match(str(location)):
        raise ValueError(
            f"{option}: expected a path of a file system, got the URL {location}; only a store and "
            "a corpus may be on S3"
        )
    if JOB_VARIABLE not in os.environ or "://" in str(location):
        return
    if JOB_COPIES in Path(location).absolute().parts:
        url = "" if isinstance(location, Path) else "s3://… or "
        raise ValueError(
            f"{option}: expected {url}an absolute path that outlives the job, got {location}, "
            "which is in the job's own copy of the working directory: Ray deletes it"
        )


def check_writable(option: str, path: Path) -> None:
    """Refuse a file that could not be written at the end of the work; makes nothing.

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
