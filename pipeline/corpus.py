"""A corpus: tars named by fsspec URLs, each one task.

Patterns take braces and globs (``s3://bucket/train-{0000..0999}.tar``). A task's id is the tar's
stem and 8 hex digits over its path below the corpus root and its size, so that a corpus may move
as a whole and keep its ids.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import fsspec
from braceexpand import braceexpand
from fsspec import AbstractFileSystem

from pipeline.commit import SourceTar

try:  # what s3fs and fsspec's http let through; neither needs to be installed
    from aiohttp import ClientError as HttpError
    from botocore.exceptions import BotoCoreError, ClientError

    _REMOTE_ERRORS: tuple[type[Exception], ...] = (HttpError, BotoCoreError, ClientError)
except ImportError:
    _REMOTE_ERRORS = ()

HEAD_BYTES = 64 * 1024
_MAGIC = re.compile(r"[*?\[]")
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_MAX_STEM = 80
# A password, or the query of a presigned URL: a commit record would keep it, and errors show it.
_SECRET = re.compile(r"[a-z0-9+.-]+://[^/]*:[^/]*@|https?://[^?]*\?", re.IGNORECASE)


class CorpusError(ValueError):
    """A corpus pattern that names nothing, or two tars that cannot be told apart."""


class SourceChangedError(RuntimeError):
    """A tar that is not what the inventory saw."""


@dataclass(frozen=True, slots=True)
class Task:
    """One tar: the unit of work, commit and retry."""

    id: str
    url: str
    num_bytes: int


def list_tasks(patterns: Sequence[str], *, root: str | None = None) -> list[Task]:
    """List the tars that match any of the patterns, sorted by URL, each once.

    ``root`` is the folder that ids are relative to; by default the deepest folder above all
    patterns that holds no glob.

    Raises:
        CorpusError: a pattern matches nothing or has a refused form; two tars share an id.
    """
    expanded = [url for pattern in patterns for url in _expand(pattern)]
    if not expanded:
        raise CorpusError("corpus: expected at least one pattern, got none")
    found: dict[str, int] = {}
    for url in expanded:
        found.update(_match(url))
    base = _whole_url(root) if root else _common_root(expanded)
    tasks: dict[str, Task] = {}
    for url, num_bytes in sorted(found.items()):
        task = Task(_task_id(url, num_bytes, base), url, num_bytes)
        if task.id in tasks:
            raise CorpusError(
                f"corpus: {task.url} and {tasks[task.id].url} share the id {task.id} (the same "
                f"path below {base} and size); give --root, a folder above both"
            )
        tasks[task.id] = task
    return list(tasks.values())


def _expand(pattern: str) -> list[str]:
    _check_url(pattern)  # before the error below may show it
    try:
        urls = list(braceexpand(pattern))
    except ValueError as error:  # unbalanced braces
        raise CorpusError(f"corpus: {error}") from error
    for url in urls:
        _check_url(url)
    return urls


def _check_url(url: str) -> None:
    scheme = url.split(":")[0]
    if "::" in url or url.startswith("pipe:"):
        raise CorpusError(
            f"corpus: expected a plain path or URL, got {scheme}:…; "
            "chained and command URLs are refused"
        )
    if _SECRET.match(url):
        raise CorpusError(
            f"corpus: expected a URL without a password or a query, got {scheme}:…; a store names "
            "its tars by URL, so give credentials by the environment or by fsspec's configuration"
        )


def _open_filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a scheme's package is missing; no such scheme
        raise CorpusError(f"corpus: {url} cannot be opened: {error}") from error
    return filesystem, path


def _match(url: str) -> dict[str, int]:
    filesystem, path = _open_filesystem(url)
    try:
        with _as_oserror(url):
            if _MAGIC.search(path):
                matches = filesystem.glob(path, detail=True)
            else:  # not exists(), which takes every error for "no"
                matches = {path: filesystem.info(path)}
    except FileNotFoundError:
        matches = {}
    files = {
        filesystem.unstrip_protocol(name): info["size"]
        for name, info in matches.items()
        if info["type"] == "file"
    }
    if not files:
        raise CorpusError(f"corpus: expected at least one tar at {url}, found none")
    for name, size in files.items():
        if size is None:
            raise CorpusError(f"corpus: {name}: expected a size in bytes, the server tells none")
    return files


def _whole_url(url: str) -> str:
    filesystem, path = _open_filesystem(url)
    return str(filesystem.unstrip_protocol(path)).rstrip("/")


def _common_root(urls: Iterable[str]) -> str:
    folders = []
    for url in urls:
        parts = _whole_url(url).split("/")[:-1]
        magic = [i for i, part in enumerate(parts) if _MAGIC.search(part)]
        folders.append(parts[: magic[0]] if magic else parts)
    common = folders[0]
    for parts in folders[1:]:
        same = [i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b]
        common = common[: same[0]] if same else common[: len(parts)]
    return "/".join(common)


def _task_id(url: str, num_bytes: int, root: str) -> str:
    if root and not url.startswith(root + "/"):
        raise CorpusError(f"corpus: expected every tar below the root {root}, got {url}")
    below = url.removeprefix(root + "/") if root else url.split("://", 1)[-1].lstrip("/")
    stem = _UNSAFE.sub("-", below.rsplit("/", 1)[-1].removesuffix(".tar"))[:_MAX_STEM]
    digest = hashlib.sha256(f"{below}\0{num_bytes}".encode()).hexdigest()[:8]
    return f"{stem}-{digest}"


@contextmanager
def open_source(task: Task) -> Iterator[tuple[BufferedReader, SourceTar]]:
    """Open a task's tar for random access, a remote one through a temporary local copy.

    Raises:
        SourceChangedError: the tar's size is not the inventory's, or it changed while open.
    """
    filesystem, path = fsspec.url_to_fs(task.url)
    if "file" in filesystem.protocol:
        with Path(path).open("rb") as file:
            before = os.fstat(file.fileno())
            yield file, _describe(file, task)
            after = Path(path).stat()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise SourceChangedError(f"{task.url}: was written to while it was read")
        return
    with tempfile.NamedTemporaryFile(prefix="ldznet-", suffix=".tar") as copy:
        with _as_oserror(task.url):
            filesystem.get_file(path, copy.name)
        with Path(copy.name).open("rb") as file:
            yield file, _describe(file, task)


def _describe(file: BufferedReader, task: Task) -> SourceTar:
    head = file.read(HEAD_BYTES)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    num_bytes = file.tell()
    file.seek(0)
    if num_bytes != task.num_bytes:
        raise SourceChangedError(
            f"{task.url}: expected {task.num_bytes} bytes as listed, got {num_bytes}; the tar "
            "changed since; run the command again to list it anew"
        )
    return SourceTar(
        url=task.url,
        num_bytes=num_bytes,
        sha256=digest,
        head_sha256=hashlib.sha256(head).hexdigest(),
    )


def digest_head(task: Task) -> str:
    """Return SHA-256 (hex) over a tar's first 64 KiB, from one ranged read."""
    filesystem, path = fsspec.url_to_fs(task.url)
    with _as_oserror(task.url):
        head = filesystem.cat_file(path, start=0, end=HEAD_BYTES)
    return hashlib.sha256(head).hexdigest()


@contextmanager
def _as_oserror(url: str) -> Iterator[None]:
    """Turn the errors of fsspec's libraries that are no OSError into one that says which tar."""
    try:
        yield
    except _REMOTE_ERRORS as error:
        # Only the kind: a library's text may quote a signed request.
        raise OSError(f"{url}: could not be read: {type(error).__name__}") from error
