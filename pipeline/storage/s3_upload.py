"""Writes one object: a small one by one PUT, a larger one by a multipart upload.

A part that was handed over is kept by obstore alone, so obstore makes its request again for as long
as patience lasts. Meanwhile the upload's owner waits here, and asks the server for something small:
so an outage is noticed, told and given up as of every other request.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pipeline.base.outages import OutageError
from pipeline.storage.interface import NewFile, StorageError
from pipeline.storage.s3_calls import call_apart
from pipeline.storage.s3_errors import translated

if TYPE_CHECKING:  # a name that obstore has in its stubs alone
    from obstore import WritableFile

logger = logging.getLogger(__name__)

PART_BYTES = 8 * 2**20  # of an upload and of a read-back: S3 takes 10,000 parts of 5 MiB or more
PARTS_IN_FLIGHT = 3
LOOK_AFTER_S = 10.0  # of waiting for a part: on a healthy way one takes a second
_ABORT_S = 5.0  # to wait for an abort, which goes on after that


class Objects(Protocol):
    """What writing an object needs of ``ObjectStorage``."""

    url: str

    def put(self, key: str, data: bytes) -> None:
        """Write a small object by one request."""

    def open_upload(self, key: str) -> "WritableFile":
        """Begin an upload of parts."""

    def find_time(self, path: str) -> float | None:
        """Ask for an object, of which there may be none."""

    def digest(self, path: str) -> tuple[int, str]:
        """Read an object back; return its size in bytes and its SHA-256 in hex."""


class ObjectFile(NewFile):
    """A new object; holds one part and those in flight, some 40 MiB, whatever its size."""

    def __init__(self, storage: Objects, key: str) -> None:
        super().__init__()
        self._storage, self._key, self._url = storage, key, f"{storage.url}/{key}"
        self._buffer = bytearray()
        self._upload: WritableFile | None = None
        self._step: Future[Any] | None = None  # of the upload, the last one
        self._state: Literal["open", "failed", "ended"] = "open"

    def _append(self, data: bytes | memoryview) -> None:
        self._check_open()
        self._buffer += data
        while len(self._buffer) >= PART_BYTES:
            part = bytes(memoryview(self._buffer)[:PART_BYTES])
            del self._buffer[:PART_BYTES]
            self._send(part)

    def _check_open(self) -> None:
        if self._state != "open":
            raise StorageError(f"{self._url}: the upload has {self._state}")

    def _send(self, part: bytes) -> None:
        upload = self._upload = self._upload or self._storage.open_upload(self._key)
        self._state = "failed"
        self._wait("write", lambda: upload.write(part))
        self._state = "open"

    def _wait(self, verb: str, call: Callable[[], Any]) -> None:
        """Do a step of the upload; raises OutageError where patience ends before it does."""
        step = self._step = call_apart(call)
        while not wait([step], LOOK_AFTER_S).done:
            self._storage.find_time(self._key)  # waits while the server is away
        with translated(self._url, verb):
            step.result()

    def close(self) -> None:
        """Send the rest and end the upload.

        If that fails, the object is read back: the server may have ended the upload, lost its
        answer, and not know the upload any more when obstore retries.
        """
        if self._state == "ended":
            return
        self._check_open()
        if self._upload is None:
            self._storage.put(self._key, bytes(self._buffer))
        else:
            self._send(bytes(self._buffer))
            self._end_upload(self._upload)
        self._state = "ended"
        self._buffer.clear()

    def _end_upload(self, upload: "WritableFile") -> None:
        self._state = "failed"
        try:
            self._wait("end the upload", upload.close)
        except (StorageError, OutageError):
            if not self._is_there():
                raise

    def _is_there(self) -> bool:
        try:
            return self._storage.digest(self._key) == (self.num_bytes, self.sha256)
        except FileNotFoundError:
            return False

    def abandon(self) -> None:
        """Abort the upload, once its last step has ended; parts that stay are left for gc."""
        state, self._state = self._state, "ended"
        self._buffer.clear()
        if state == "ended" or self._upload is None:
            return
        upload, step = self._upload, self._step

        def abort() -> None:
            if step is not None:
                wait([step])
            upload.__exit__(StorageError, None, None)  # obstore's only way to abort

        aborted = call_apart(abort)
        try:
            if not wait([aborted], _ABORT_S).done:
                raise StorageError(f"{self._url}: could not abort the upload in {_ABORT_S:g} s")
            with translated(self._url, "abort the upload"):
                aborted.result()
        except OSError as error:
            logger.warning("%s", error)
