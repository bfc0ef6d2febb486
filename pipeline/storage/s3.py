"""Storage on S3, or on a server that speaks its protocol, through obstore.

A file is an object below the URL's prefix, which appears whole when its upload ends; a record is
one PUT with ``If-None-Match: *``. obstore retries throttling, server errors, resets and time-outs
with capped exponential backoff, a denied request never. The server needs conditional PUTs
(``open.check_create`` tests them) and read-after-write consistency. Parts of uploads that a killed
process leaves are removed by ``gc`` and by the bucket's lifecycle rule (docs/cluster.md).
"""

import hashlib
import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import obstore
from obstore.store import S3Store

from pipeline.base.failpoints import pass_step
from pipeline.storage.aws import read_aws_settings
from pipeline.storage.interface import Scatter, StorageError, Upload, check_path
from pipeline.storage.s3_errors import CutError, RangeError, translated
from pipeline.storage.s3_unfinished import list_unfinished
from pipeline.storage.s3_upload import PART_BYTES, ObjectFile

if TYPE_CHECKING:  # names that obstore has in its stubs alone
    from contextlib import AbstractContextManager

    from obstore import ObjectMeta, OffsetRange

logger = logging.getLogger(__name__)

_DELETE_BATCH = 1000  # keys a DeleteObjects request takes
_COALESCE_BYTES = 1 << 20  # ranges closer than this are one request
_LIST_PAUSE_S = 0.2  # before a listing whose answer was cut is asked for again
_URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>[^?#\0]*))?")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a request, and how often to retry it, before it is an error."""

    max_retries: int = 10
    max_backoff_s: float = 10.0
    total_s: float = 120.0  # no new try after this
    request_s: float = 60.0  # one try, a part of PART_BYTES at 140 kB/s


class ObjectStorage:
    """The objects below ``s3://bucket/prefix``. Opening asks no server."""

    reads_at_once = 32  # a small read costs latency, not bandwidth
    create_needs = "a bucket that may be written, on a server that honours If-None-Match on PUT"

    def __init__(self, url: str, *, patience: Patience | None = None) -> None:
        bucket, prefix = _parse_url(url)
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._patience = patience or Patience()
        settings = read_aws_settings()
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            config=settings.config,
            client_options={
                "allow_http": settings.allow_http,
                "connect_timeout": timedelta(seconds=5),
                "timeout": timedelta(seconds=self._patience.request_s),
            },
            retry_config={
                "max_retries": self._patience.max_retries,
                "retry_timeout": timedelta(seconds=self._patience.total_s),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=self._patience.max_backoff_s),
                    "base": 2,
                },
            },
            credential_provider=settings.credentials,
        )

    def __reduce__(self) -> tuple[type["ObjectStorage"], tuple[str]]:
        return ObjectStorage, (self.url,)  # credentials stay where they are

    def exists(self, path: str) -> bool:
        """Return whether there is an object of this name: one request."""
        return self.find_time(path) is not None

    def read(self, path: str) -> bytes:
        """Return an object's bytes; raises StorageError if the server gave fewer than it has."""
        data, size = self._read_start(path, {"offset": 0})
        self._check_length(path, len(data), size)
        return data

    def _read_start(self, path: str, wanted: "tuple[int, int] | OffsetRange") -> tuple[bytes, int]:
        """Return the bytes of a range from 0 on, and the object's size, which the answer tells."""
        try:
            with self._errors("read", path):
                result = obstore.get(self._store, _key(path), options={"range": wanted})
                return bytes(result.bytes()), result.meta["size"]
        except RangeError:
            return b"", self.size(path)  # an empty object has no ranges

    def read_range(self, path: str, start: int, num_bytes: int) -> bytes:
        """Return bytes [start, start + num_bytes) of an object; errors as ``read``."""
        if num_bytes <= 0:
            return b""
        try:
            with self._errors("read", path):
                key = _key(path)
                data = bytes(obstore.get_range(self._store, key, start=start, length=num_bytes))
        except RangeError:
            data = b""
        if len(data) != num_bytes:
            there = max(0, min(num_bytes, self.size(path) - start))
            self._check_length(path, len(data), there)
        return data

    def read_into(self, path: str, parts: Sequence[Scatter]) -> bool:
        """Read ranges of an object into memories; False if it ends inside one.

        Ranges close to each other are one request, and several requests run at a time. Errors are
        those of ``read``.
        """
        ranges = [(start, sum(map(len, memories))) for start, memories in parts]
        found = self._get_ranges(path, ranges)
        if found is None:
            again = (self.read_range(path, start, num_bytes) for start, num_bytes in ranges)
            found = [np.frombuffer(data, np.uint8) for data in again]
        for data, (_, memories), (_, num_bytes) in zip(found, parts, ranges, strict=True):
            if len(data) != num_bytes:
                return False
            at = 0
            for memory in memories:
                memory[:] = data[at : at + len(memory)].data
                at += len(memory)
        return True

    def _get_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray] | None:
        """Return ranges as uint8 arrays (num_bytes,), or None if the server gave one cut."""
        try:
            with self._errors("read", path):
                found = obstore.get_ranges(
                    self._store,
                    _key(path),
                    starts=[start for start, _ in ranges],
                    lengths=[num_bytes for _, num_bytes in ranges],
                    coalesce=_COALESCE_BYTES,
                )
        except RangeError:
            return None
        given = [np.frombuffer(memoryview(data), np.uint8) for data in found]
        return given if [len(data) for data in given] == [n for _, n in ranges] else None

    def _check_length(self, path: str, num_bytes: int, expected: int) -> None:
        if num_bytes != expected:
            raise StorageError(
                f"{self.url}/{path}: expected {expected} bytes, the server gave {num_bytes}; "
                "look at what is between here and the server, then run the command again"
            )

    def size(self, path: str) -> int:
        """Return an object's size in bytes."""
        return self._get_meta(path)["size"]

    def find_time(self, path: str) -> float | None:
        """Return an object's LastModified, seconds since the epoch, or None if it is gone."""
        try:
            return self._get_meta(path)["last_modified"].timestamp()
        except FileNotFoundError:
            return None

    def _get_meta(self, path: str) -> "ObjectMeta":
        with self._errors("look at", path):
            return obstore.head(self._store, _key(path))

    def digest(self, path: str) -> tuple[int, str]:
        """Read an object back, 8 MiB at a time; return its size and its SHA-256 in hex."""
        data, size = self._read_start(path, (0, PART_BYTES))
        self._check_length(path, len(data), min(size, PART_BYTES))
        digest = hashlib.sha256(data)
        for start in range(PART_BYTES, size, PART_BYTES):
            digest.update(self.read_range(path, start, min(PART_BYTES, size - start)))
        return size, digest.hexdigest()

    def list_names(self, folder: str | None = None) -> Iterator[str]:
        """Yield the names in a folder; see ``Storage``."""
        key = None if folder is None else _key(folder)
        for tries_left in reversed(range(self._patience.max_retries + 1)):
            try:
                with self._errors("list", folder or ""):
                    found = obstore.list_with_delimiter(self._store, key)
                break
            except CutError:
                if not tries_left:
                    raise
                time.sleep(_LIST_PAUSE_S)
        yield from (_name(path) for path in found["common_prefixes"])
        yield from (_name(entry["path"]) for entry in found["objects"])

    def list_files(self, folder: str | None = None) -> Iterator[tuple[str, int]]:
        """Yield (path in the store, bytes) of every object below a folder."""
        for entry in self._list(folder):
            yield entry["path"], entry["size"]

    def list_times(self, folder: str) -> dict[str, float]:
        """Return name → LastModified, seconds since the epoch, of the objects in a folder."""
        return {_name(x["path"]): x["last_modified"].timestamp() for x in self._list(folder)}

    def _list(self, folder: str | None) -> "Iterator[ObjectMeta]":
        key, after = None if folder is None else _key(folder), None
        for tries_left in reversed(range(self._patience.max_retries + 1)):
            try:
                with self._errors("list", folder or ""):
                    for page in obstore.list(self._store, key, offset=after):
                        yield from page
                        after = page[-1]["path"]  # S3 lists in the order of names
                return
            except CutError:
                if not tries_left:
                    raise
                time.sleep(_LIST_PAUSE_S)

    def open_write(self, path: str) -> ObjectFile:
        """Open an object under a new name to write it once."""
        key = _key(path)
        return ObjectFile(
            self._store, key, url=f"{self.url}/{key}", digest=lambda: self.digest(key)
        )

    def list_uploads(self, folder: str) -> Iterator[Upload]:
        """Yield the uploads below a folder that have not ended; needs the extra ``s3``."""
        return list_unfinished(self.url, _key(folder))

    def sync_folders(self, folder: str) -> None:
        """Do nothing: an object is durable and listed once its upload has ended."""
        check_path(folder)

    def release(self) -> None:
        """Do nothing: obstore keeps the connections."""

    def remove_tree(self, path: str) -> None:
        """Remove an object of this name and all below it."""
        try:
            keys = [_key(path), *(below for below, _ in self.list_files(path))]
            for start in range(0, len(keys), _DELETE_BATCH):
                with self._errors("remove", path):
                    obstore.delete(self._store, keys[start : start + _DELETE_BATCH])
        except OSError as error:
            logger.warning("%s: left for gc: %s", path, error)

    def create(self, path: str, data: bytes) -> bool:
        """Write a whole object if and only if there is none; False if there is one already.

        obstore retries when the server reports a failure, so the object there may come from a first
        try whose answer was lost. It does not retry when a connection broke or the server answered
        409, which tells of a concurrent try but not of its end: then the PUT is sent again for as
        long as there is no object, at most ``Patience.total_s``.
        """
        key = _key(path)
        pause_s, end = 0.1, time.monotonic() + self._patience.total_s
        while True:
            pass_step("record.written")
            try:
                with self._errors("create", path):
                    obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except (FileExistsError, StorageError) as error:
                failed = error
            else:
                pass_step("record.created")
                return True
            if self.exists(path):
                return False
            if time.monotonic() + pause_s > end:
                raise StorageError(str(failed)) from None
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, self._patience.max_backoff_s)

    def _errors(self, verb: str, path: str) -> "AbstractContextManager[None]":
        return translated(f"{self.url}/{path}".rstrip("/"), verb)


def _key(path: str) -> str:
    return str(PurePosixPath(check_path(path)))


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _parse_url(url: str) -> tuple[str, str]:
    """Return bucket and prefix; a URL that is refused may hold a secret and is not shown."""
    found = _URL.fullmatch(url)
    prefix = (found["prefix"] or "").strip("/") if found else ""
    if found is None or (prefix and ("//" in prefix or {".", ".."} & set(prefix.split("/")))):
        raise ValueError(
            "store: expected s3://bucket/prefix without a user, password, query or empty folder; "
            "credentials come from the environment, a profile or a role"
        )
    if prefix:
        check_path(prefix)
    return found["bucket"], prefix
