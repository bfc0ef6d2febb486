"""What obstore and a server say, as the OSError family: what, where, and the next step.

Only an HTTP status, S3's error code and obstore's own reason are kept. A server's answer may quote
the headers that were signed, a session token among them, and never reaches a text.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)

from pipeline.storage.interface import StorageError

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([\w.-]{1,80})</Code>")
_TRIES = re.compile(r"after (\d+) retries")
_REASON = re.compile(r"HTTP error: [\w .,:'-]{1,120}")


class RangeError(StorageError):
    """A range that starts behind an object's end."""


class CutError(StorageError):
    """An answer that ended before its length, where obstore does not ask again by itself."""


@contextmanager
def translated(where: str, verb: str) -> Iterator[None]:
    """Raise obstore's errors inside as FileNotFoundError, PermissionError or StorageError.

    FileExistsError stands for an object that is there, or for two writers at a time. The error
    itself is not chained: its text may hold what must not be shown.
    """
    try:
        yield
    except (BaseError, OSError) as error:
        raise _translate(error, where, verb) from None


def _translate(error: Exception, where: str, verb: str) -> OSError:
    if isinstance(error, StorageError | PermissionError | FileExistsError):
        return error
    text = str(error).split("\n\nDebug source")[0]
    found = _STATUS.search(text)
    status = found[1] if found else ""
    what = f"{where}: could not {verb}: {_describe(error, text, status)}"
    if "<Code>NoSuchBucket</Code>" in text:
        return StorageError(f"{what}. Create the bucket, or correct the URL")
    if isinstance(error, FileNotFoundError) and "<Code>NoSuchUpload</Code>" not in text:
        return FileNotFoundError(f"{where}: no such object")
    if isinstance(error, AlreadyExistsError):
        return FileExistsError(what)
    refused = isinstance(error, PermissionDeniedError | UnauthenticatedError)
    if refused or status in ("401", "403"):
        return PermissionError(
            f"{what}. Look at the credentials (environment, AWS_PROFILE, role) and at what they "
            "may do on the bucket"
        )
    if status == "416":
        return RangeError(what)
    kind = CutError if "body error" in text and "retries" not in text else StorageError
    return kind(f"{what}. Look at the server and the way to it, then run the same command again")


def _describe(error: Exception, text: str, status: str) -> str:
    code, tries, reason = _CODE.search(text), _TRIES.search(text), _REASON.search(text)
    if status:
        said = " ".join(["HTTP", status, code[1] if code else ""]).strip()
    elif reason:
        said = reason[0]
    elif isinstance(error, UnauthenticatedError):
        said = "no credentials were found"
    else:
        said = type(error).__name__
    return f"{said} after {tries[1]} retries" if tries else said
