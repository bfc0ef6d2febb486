"""Writes one object: a small one by one PUT, a larger one by a multipart upload."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import obstore
from obstore.store import S3Store

from pipeline.storage.interface import NewFile, StorageError
from pipeline.storage.s3_errors import translated

if TYPE_CHECKING:  # a name that obstore has in its stubs alone
    from obstore import WritableFile

logger = logging.getLogger(__name__)

PART_BYTES = 8 * 2**20  # of an upload and of a read-back: S3 takes 10,000 parts of 5 MiB or more
_PARTS_IN_FLIGHT = 3


class ObjectFile(NewFile):
    """A new object; holds one part and those in flight, some 40 MiB, whatever its size.

    ``url`` is the object's, for errors; ``digest`` reads it back: size and SHA-256 in hex.
    """

    def __init__(
        self, store: S3Store, key: str, *, url: str, digest: Callable[[], tuple[int, str]]
    ) -> None:
        super().__init__()
        self._store, self._key, self._url, self._digest_stored = store, key, url, digest
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
            raise StorageError(f"{self._url}: the upload has {self._state}")

    def _send(self, part: bytes) -> None:
        if self._upload is None:
            self._upload = obstore.open_writer(
                self._store, self._key, buffer_size=PART_BYTES, max_concurrency=_PARTS_IN_FLIGHT
            )
        self._state = "failed"
        with translated(self._url, "write"):
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
            with translated(self._url, "write"):
                obstore.put(self._store, self._key, bytes(self._buffer), use_multipart=False)
        else:
            self._send(bytes(self._buffer))
            self._end_upload(self._upload)
        self._state = "ended"
        self._buffer.clear()

    def _end_upload(self, upload: "WritableFile") -> None:
        self._state = "failed"
        try:
            with translated(self._url, "end the upload"):
                upload.close()
        except StorageError:
            if not self._is_there():
                raise

    def _is_there(self) -> bool:
        try:
            return self._digest_stored() == (self.num_bytes, self.sha256)
        except FileNotFoundError:
            return False

    def abandon(self) -> None:
        """Abort the upload; if that fails, its parts are left to the bucket's lifecycle rule."""
        state, self._state = self._state, "ended"
        self._buffer.clear()
        if state == "ended" or self._upload is None:
            return
        try:
            with translated(self._url, "abort the upload"):
                self._upload.__exit__(StorageError, None, None)  # obstore's only way to abort
        except OSError as error:
            logger.warning("%s", error)
