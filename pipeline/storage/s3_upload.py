"""Writes one object: a small one by one PUT, a larger one by a multipart upload."""

import logging
from typing import TYPE_CHECKING, Literal, Protocol

from pipeline.storage.interface import NewFile, StorageError
from pipeline.storage.s3_errors import translated

if TYPE_CHECKING:  # a name that obstore has in its stubs alone
    from obstore import WritableFile

logger = logging.getLogger(__name__)

PART_BYTES = 8 * 2**20  # of an upload and of a read-back: S3 takes 10,000 parts of 5 MiB or more


class Uploads(Protocol):
    """The methods of ``s3.ObjectStorage`` that an upload calls."""

    url: str

    def open_upload(self, path: str) -> "WritableFile":
        """Open a multipart upload."""

    def put(self, path: str, data: bytes) -> None:
        """Write a whole object by one request."""

    def digest(self, path: str) -> tuple[int, str]:
        """Return an object's size and its SHA-256 in hex."""


class ObjectFile(NewFile):
    """A new object; holds one part and those in flight, some 40 MiB, whatever its size."""

    def __init__(self, storage: Uploads, path: str) -> None:
        super().__init__()
        self._storage = storage
        self._path = path
        self._buffer = bytearray()
        self._upload: WritableFile | None = None
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
            raise StorageError(f"{self._storage.url}/{self._path}: the upload has {self._state}")

    def _send(self, part: bytes) -> None:
        if self._upload is None:
            self._upload = self._storage.open_upload(self._path)
        self._state = "failed"
        with translated(f"{self._storage.url}/{self._path}", "write"):
            self._upload.write(part)
        self._state = "open"

    def close(self) -> None:
        """Send the rest and end the upload.

        If that fails, the object is read back: the server may have ended the upload, lost its
        answer, and not know the upload any more when obstore retries.
        """
        if self._state == "ended":
            return
        self._check_open()
        if self._upload is None:
            self._storage.put(self._path, bytes(self._buffer))
        else:
            self._send(bytes(self._buffer))
            self._end_upload(self._upload)
        self._state = "ended"
        self._buffer.clear()

    def _end_upload(self, upload: "WritableFile") -> None:
        self._state = "failed"
        try:
            with translated(f"{self._storage.url}/{self._path}", "end the upload"):
                upload.close()
        except StorageError:
            if not self._is_there():
                raise

    def _is_there(self) -> bool:
        try:
            return self._storage.digest(self._path) == (self.num_bytes, self.sha256)
        except FileNotFoundError:
            return False

    def abandon(self) -> None:
        """Abort the upload; if that fails, its parts are left to the bucket's lifecycle rule."""
        state, self._state = self._state, "ended"
        self._buffer.clear()
        if state == "ended" or self._upload is None:
            return
        try:
            with translated(f"{self._storage.url}/{self._path}", "abort the upload"):
                self._upload.__exit__(StorageError, None, None)  # obstore's only way to abort
        except OSError as error:
            logger.warning("%s", error)
