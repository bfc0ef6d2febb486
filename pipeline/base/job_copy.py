"""The copy of ``--working-dir`` in which a Ray job runs, and which Ray deletes after the job."""

import os
from pathlib import Path

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for a submitted job
JOB_COPIES = "working_dir_files"  # the folder into which Ray unpacks --working-dir


def is_in_job_copy(path: str | Path) -> bool:
    """Tell whether this is a job, and a path lies in its copy; a URL does not."""
    if JOB_VARIABLE not in os.environ or "://" in str(path):
        return False
    return JOB_COPIES in Path(path).absolute().parts


def outlive_job(path: str) -> str:
    """Return an absolute path as a record may keep it: from the current folder in a job's copy.

    So it names the same file in any copy of what was sent, for instance in the user's checkout.
    """
    return os.path.relpath(path) if Path(path).is_absolute() and is_in_job_copy(path) else path
