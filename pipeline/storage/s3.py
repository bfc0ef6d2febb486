"""Storage on S3, or on a server that speaks its protocol, through obstore.

A file is an object below the URL's prefix, which appears whole when its upload ends; a record is
one PUT with ``If-None-Match: *``. Throttling, server errors, resets, time-outs and answers cut
short are outages (``pipeline/base/outages.py``): obstore tries such a request again a few times, to
pass over a blip, and the process's patience does the rest. A denied request is never tried again.
The server needs conditional PUTs (``open.check_create`` tests them) and read-after-write
consistency. Parts of uploads that a killed process leaves are removed by ``gc`` and by the bucket's
lifecycle rule (docs/cluster.md).
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import obstore
from obstore.store import S3Store

from pipeline.base.failpoints import pass_step
from pipeline.base.outages import PATIENCE, OutageError, Patience
from pipeline.base.progress_text import count_noun
from pipeline.storage.aws import read_aws_settings
from pipeline.storage.interface import Scatter, Upload, check_path
from pipeline.storage.s3_calls import call_interruptibly, refuse_forked
from pipeline.storage.s3_errors import RangeError, translated
from pipeline.storage.s3_unfinished import list_unfinished
from pipeline.storage.s3_upload import PART_BYTES, PARTS_IN_FLIGHT, ObjectFile

if TYPE_CHECKING:  # names that obstore has in its stubs alone
    from obstore import ObjectMeta, OffsetRange, SuffixRange, WritableFile


_DELETE_BATCH = 1000  # keys a DeleteObjects request takes
_COALESCE_BYTES = 1 << 20  # ranges closer than this are one request
NUM_RETRIES, RETRY_S = 2, 5.0  # obstore's own, of a request
_REQUEST_S = 60.0  # one try, a part of PART_BYTES at 140 kB/s
_MAX_UPLOAD_S = 13 * 60.0  # S3 refuses what was signed 15 minutes ago
T = TypeVar("T")
_URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>[^?#\0]*))?")

_BUCKET = re.compile(r"s3://([A-Za-z0-9._-]+)(?:/[^@?#\0]*)?")  # of any name that holds no secret


class ObjectStorage:
    """The objects below ``s3://bucket/prefix``. Opening asks no server."""

    reads_at_once = 32  # a small read costs latency, not bandwidth
    create_needs = "a bucket that may be written, on a server that honours If-None-Match on PUT"

    def __init__(self, url: str, *, patience: Patience = PATIENCE) -> None:
        self._bucket, self._prefix = _parse_url(url)
        self.url = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        self._patience = patience
        self._settings = read_aws_settings()
        self._store = self._open_store(num_retries=NUM_RETRIES, retry_s=RETRY_S, max_backoff_s=1)

    def _open_store(self, *, num_retries: int, retry_s: float, max_backoff_s: float) -> S3Store:
        return S3Store(
            self._bucket,
            prefix=self._prefix or None,
            config=self._settings.config,
            client_options={
                "allow_http": self._settings.allow_http,
                "connect_timeout": timedelta(seconds=5),
                "timeout": timedelta(seconds=_REQUEST_S),
            },
            retry_config={
                "max_retries": num_retries,
                "retry_timeout": timedelta(seconds=retry_s),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=max_backoff_s),
                    "base": 2,
                },
            },
            credential_provider=self._settings.credentials,
        )

    @cached_property
    def _upload_store(self) -> S3Store:
        """The store for uploads of parts, which obstore itself tries as long as patience lasts."""
        retry_s = min(self._patience.total_s, _MAX_UPLOAD_S)
        return self._open_store(num_retries=10_000, retry_s=retry_s, max_backoff_s=10)

    def __reduce__(self) -> tuple[type["ObjectStorage"], tuple[str]]:
        return ObjectStorage, (self.url,)  # credentials stay where they are

    def exists(self, path: str) -> bool:
        """Return whether there is an object of this name: one request."""
        return self.find_time(path) is not None

    def read(self, path: str) -> bytes:
        """Return an object's bytes; an answer with fewer than it has counts as an outage."""
        return self._read_part(path, {"offset": 0}, lambda size: size)[0]

    def read_tail(self, path: str, num_bytes: int) -> tuple[bytes, int]:
        """Return an object's last bytes, fewer where it has fewer, and its size; one request."""
        return self._read_part(path, {"suffix": num_bytes}, lambda size: min(size, num_bytes))

    def _read_part(
        self,
        path: str,
        part: "tuple[int, int] | OffsetRange | SuffixRange",
        expect: Callable[[int], int],
    ) -> tuple[bytes, int]:
        """Return a part of an object, and the object's size, which the answer tells.

        ``expect`` gives the part's bytes by the object's.
        """

        def get() -> tuple[bytes, int]:
            result = obstore.get(self._store, key, options={"range": part})
            return bytes(result.bytes()), result.meta["size"]

        def read_once() -> tuple[bytes, int]:
            try:
                data, size = self._ask("read", path, get)
            except RangeError:
                data, size = b"", self._look(path)["size"]  # an empty object has no ranges
            self._check_length(path, len(data), expect(size))
            return data, size

        key = _key(path)
        return self._ride_out(read_once)

    def read_range(self, path: str, start: int, num_bytes: int) -> bytes:
        """Return bytes [start, start + num_bytes) of an object; errors as ``read``."""
        if num_bytes <= 0:
            return b""

        def get() -> bytes:
            return bytes(obstore.get_range(self._store, key, start=start, length=num_bytes))

        def read_once() -> bytes:
            try:
                data = self._ask("read", path, get)
            except RangeError:
                data = b""
            if len(data) != num_bytes:
                there = max(0, min(num_bytes, self._look(path)["size"] - start))
                self._check_length(path, len(data), there)
            return data

        key = _key(path)
        return self._ride_out(read_once)

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
        key, (starts, lengths) = _key(path), zip(*ranges, strict=True)

        def get() -> list[np.ndarray]:
            found = obstore.get_ranges(
                self._store, key, starts=starts, lengths=lengths, coalesce=_COALESCE_BYTES
            )
            return [np.frombuffer(memoryview(data), np.uint8) for data in found]

        try:
            given = self._request("read", path, get)
        except RangeError:
            return None
        return given if [len(data) for data in given] == list(lengths) else None

    def _check_length(self, path: str, num_bytes: int, expected: int) -> None:
        if num_bytes != expected:
            what = f"expected {expected} bytes, the server gave {num_bytes}"
            raise OutageError.because(what, f"{self.url}/{path}: {what}")

    def size(self, path: str) -> int:
        """Return an object's size in bytes."""
        return self._ride_out(lambda: self._look(path))["size"]

    def find_time(self, path: str) -> float | None:
        """Return an object's LastModified, seconds since the epoch, or None if it is gone."""
        try:
            return self._ride_out(lambda: self._look(path))["last_modified"].timestamp()
        except FileNotFoundError:
            return None

    def _look(self, path: str) -> "ObjectMeta":
        """Return an object's metadata, by one try."""
        return self._ask("look at", path, lambda: obstore.head(self._store, _key(path)))

    def digest(self, path: str) -> tuple[int, str]:
        """Read an object back, 8 MiB at a time; return its size and its SHA-256 in hex."""
        part = (0, PART_BYTES)
        data, size = self._read_part(path, part, lambda size: min(size, PART_BYTES))
        digest = hashlib.sha256(data)
        for start in range(PART_BYTES, size, PART_BYTES):
            digest.update(self.read_range(path, start, min(PART_BYTES, size - start)))
        return size, digest.hexdigest()

    def list_names(self, folder: str | None = None) -> Iterator[str]:
        """Yield the names in a folder; see ``Storage``."""
        key = None if folder is None else _key(folder)
        found = self._request(
            "list", folder or "", lambda: obstore.list_with_delimiter(self._store, key)
        )
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
        """Yield what is below a folder; a listing that was cut goes on where it was."""
        key, after = None if folder is None else _key(folder), None
        pages: Iterator[Sequence[ObjectMeta]] | None = None

        def read_page() -> "Sequence[ObjectMeta]":
            nonlocal pages
            ours = obstore.list(self._store, key, offset=after) if pages is None else pages
            pages = None  # unless this page comes
            page = next(ours, ())
            pages = ours
            return page

        while page := self._request("list", folder or "", read_page):
            yield from page
            after = page[-1]["path"]  # S3 lists in the order of names

    def open_write(self, path: str) -> ObjectFile:
        """Open an object under a new name to write it once."""
        return ObjectFile(self, _key(path))

    def put(self, key: str, data: bytes) -> None:
        """Write a small object by one request."""
        self._request(
            "write", key, lambda: obstore.put(self._store, key, data, use_multipart=False)
        )

    def open_upload(self, key: str) -> "WritableFile":
        """Begin an upload of parts, whose requests obstore itself makes again."""
        refuse_forked(self.url)
        return obstore.open_writer(
            self._upload_store, key, buffer_size=PART_BYTES, max_concurrency=PARTS_IN_FLIGHT
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
        keys = [_key(path), *(below for below, _ in self.list_files(path))]
        for start in range(0, len(keys), _DELETE_BATCH):
            some = keys[start : start + _DELETE_BATCH]
            self._request("remove", path, partial(obstore.delete, self._store, some))

    def create(self, path: str, data: bytes) -> bool:
        """Write a whole object if and only if there is none; False if there is one already.

        The object there may come from a first try whose answer was lost. After a try that failed,
        or that was answered 409, which tells of a concurrent one but not of its end, the PUT is
        sent again for as long as there is no object and patience lasts.
        """
        key = _key(path)

        def create() -> None:
            obstore.put(self._store, key, data, mode="create", use_multipart=False)

        def create_once() -> bool:
            pass_step("record.written")
            try:
                self._ask("create", path, create)
            except (FileExistsError, OutageError) as error:
                if self._is_there(path):
                    return False
                raise OutageError.because(
                    getattr(error, "reason", "HTTP 409"), str(error)
                ) from None
            pass_step("record.created")
            return True

        return self._ride_out(create_once)

    def write_content(self, path: str, data: bytes) -> None:
        """Write an object named by its content; one that is there asks for no right to write."""
        if not self.exists(path):
            self.create(path, data)

    def _is_there(self, path: str) -> bool:
        """Return whether there is an object of this name, by one try."""
        try:
            self._look(path)
        except FileNotFoundError:
            return False
        return True

    def _ask(self, verb: str, path: str, call: Callable[[], T]) -> T:
        """Return ``call()``, one try of a request, with its errors translated."""
        refuse_forked(self.url)
        with translated(f"{self.url}/{path}".rstrip("/"), verb):
            return call_interruptibly(call)

    def _request(self, verb: str, path: str, call: Callable[[], T]) -> T:
        return self._ride_out(lambda: self._ask(verb, path, call))

    def _ride_out(self, attempt: Callable[[], T]) -> T:
        return self._patience.ride_out(attempt, url=self.url)


def _key(path: str) -> str:
    return str(PurePosixPath(check_path(path)))


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _parse_url(url: str) -> tuple[str, str]:
    """Return bucket and prefix; a URL that is refused may hold a secret and is not shown."""
    bucket = _BUCKET.fullmatch(url)
    if bucket and not _URL.fullmatch(f"s3://{bucket[1]}"):
        raise ValueError(
            f"store: expected a bucket of 3 to 63 lower-case letters, digits, dots and hyphens, "
            f"got another name, of {count_noun(len(bucket[1]), 'character')}"
        )
    found = _URL.fullmatch(url)
    prefix = (found["prefix"] or "").strip("/") if found else ""
    if found is None or (prefix and ("//" in prefix or {".", ".."} & set(prefix.split("/")))):
        raise ValueError(
            "store: expected s3://bucket/prefix, with s3:// as it is here, without a user, "
            "password, query or empty folder; credentials come from the environment, a profile or "
            "a role"
        )
    if prefix:
        check_path(prefix)
    return found["bucket"], prefix
