"""Translates obstore's errors to the OSError family: what, where, and the next step.

Only the HTTP status, S3's error code and obstore's own reason are kept: a server's answer may quote
the signed headers, a session token among them, and is never shown.
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
    """A range that starts beyond an object's end."""


class CutError(StorageError):
    """An answer cut short, of a request that obstore does not retry by itself."""


@contextmanager
def translated(where: str, verb: str) -> Iterator[None]:
    """Raise obstore's errors as FileNotFoundError, PermissionError or StorageError.

    FileExistsError means that there is an object already, or two writers at a time. The original
    error is not chained, since its text may hold secrets.
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
