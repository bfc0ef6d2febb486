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

from pipeline.base.outages import OutageError
from pipeline.storage.aws import NoCredentialsError
from pipeline.storage.interface import StorageError

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([\w.-]{1,80})</Code>")
_REASON = re.compile(r"HTTP error: [\w .,:'-]{1,120}")
_CAUSES = {  # words of obstore's debug text, which is not shown
    "ConnectionRefused": "connection refused",
    "ConnectionReset": "connection reset",
    "TimedOut": "timed out",
    "dns error": "name not found",
    "IncompleteBody": "answer cut short",
}
_MAY_PASS = {"408", "429", *map(str, range(500, 600))} - {"501", "505"}


class RangeError(StorageError):
    """A range that starts beyond an object's end."""


@contextmanager
def translated(where: str, verb: str) -> Iterator[None]:
    """Raise obstore's errors as FileNotFoundError, PermissionError, OutageError or StorageError.

    FileExistsError means that there is an object already, or two writers at a time. The original
    error is not chained, since its text may hold secrets.
    """
    try:
        yield
    except (BaseError, OSError) as error:
        raise _translate(error, where, verb) from None


def _translate(error: Exception, where: str, verb: str) -> OSError:
    if isinstance(error, StorageError | OutageError | PermissionError | FileExistsError):
        return error
    text, _, debug = str(error).partition("\n\nDebug source")
    found = _STATUS.search(text)
    status = found[1] if found else ""
    said = _describe(error, text, debug, status)
    what = f"{where}: could not {verb}: {said}"
    if "<Code>NoSuchBucket</Code>" in text:
        return StorageError(f"{what}. Create the bucket, or correct the URL")
    if isinstance(error, FileNotFoundError) and "<Code>NoSuchUpload</Code>" not in text:
        return FileNotFoundError(f"{where}: no such object")
    if isinstance(error, AlreadyExistsError):
        return FileExistsError(what)
    refused = isinstance(error, PermissionDeniedError | UnauthenticatedError)
    if refused or status in ("401", "403"):
        none_there = isinstance(error, UnauthenticatedError) and not status
        return (NoCredentialsError if none_there else PermissionError)(
            f"{what}. Look at the credentials (environment, AWS_PROFILE, role) and at what they "
            "may do on the bucket"
        )
    if status == "416":
        return RangeError(what)
    cut = "HTTP error" in text or "invalid list response" in text
    if status in _MAY_PASS or (cut and not status):
        return OutageError.because(said, what)
    return StorageError(what)


def _describe(error: Exception, text: str, debug: str, status: str) -> str:
    code, reason = _CODE.search(text), _REASON.search(text)
    if status:
        return " ".join(["HTTP", status, code[1] if code else ""]).strip()
    cause = next((said for word, said in _CAUSES.items() if word in debug), "")
    if reason:
        return cause or reason[0]
    if isinstance(error, UnauthenticatedError):
        return "no credentials were found"
    return "answer cut short" if "invalid list response" in text else type(error).__name__
