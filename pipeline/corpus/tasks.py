"""Lists a corpus, tars named by fsspec URLs, as tasks, and splits long tars into several.

Patterns take braces and globs (``s3://bucket/train-{0000..0999}.tar``). A task's id is the tar's
stem and 8 hex digits over its path below the corpus root and its size, so that a corpus may move
as a whole and keep its ids. The parts of a long tar are ranges of its samples (``parts``), each
with a writer and a commit of its own.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from braceexpand import braceexpand
from fsspec import AbstractFileSystem

from pipeline.base.remote_copy import as_oserror, open_filesystem
from pipeline.base.secrets import find_url_fault
from pipeline.store.task_ids import list_part_ids, parse_part_id, part_suffix

logger = logging.getLogger(__name__)
_MAGIC = re.compile(r"[*?\[]")
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_MAX_STEM = 80


class CorpusError(ValueError):
    """A corpus pattern that matches nothing, or two tars with one id."""


@dataclass(frozen=True, slots=True)
class Task:
    """One tar, or one part of a long one: the unit of work, commit and retry.

    ``num_bytes`` is the whole tar's; ``part`` is from 0 to ``num_parts`` - 1.
    """

    id: str
    url: str
    num_bytes: int
    part: int = 0
    num_parts: int = 1

    @property
    def tar_id(self) -> str:
        """The id of the whole tar, which all its parts share."""
        return self.id.removesuffix(part_suffix(self.part, self.num_parts))

    def is_sibling(self, task_id: str) -> bool:
        """Return whether an id is that of a part of the same tar, split alike."""
        found = parse_part_id(task_id)
        return found is not None and (found[0], found[2]) == (self.tar_id, self.num_parts)


def list_tasks(patterns: Sequence[str], *, root: str | None = None) -> list[Task]:
    """List the tars that match any of the patterns, sorted by URL, each once.

    ``root`` is the folder that ids are relative to; by default the deepest folder without a glob
    that is above all patterns.

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


def split_tasks(tasks: Sequence[Task], split_bytes: int | None) -> list[Task]:
    """Split tars longer than ``split_bytes`` into ceil(num_bytes / split_bytes) parts each.

    The parts take their tar's place, in order, with the ids ``<tar's id>-p0003of0010``. None splits
    nothing. A layer's spec holds ``split_bytes``, so that all its runs split alike.
    """
    if split_bytes is None:
        return list(tasks)
    parts: list[Task] = []
    for task in tasks:
        assert task.num_parts == 1, f"{task.id} is a part already"
        num = max(1, -(-task.num_bytes // split_bytes))
        for i, part_id in enumerate(list_part_ids(task.id, num)):
            parts.append(Task(part_id, task.url, task.num_bytes, i, num))
    return parts


def _expand(pattern: str) -> list[str]:
    _check_url(pattern)  # first, since the error below may show it
    try:
        urls = list(braceexpand(pattern))
    except ValueError as error:  # unbalanced braces
        raise CorpusError(f"corpus: {error}") from error
    for url in urls:
        _check_url(url)
    return urls


def _check_url(url: str) -> None:
    if fault := find_url_fault(url):
        raise CorpusError(f"corpus: {fault}")


def _open_filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    try:
        return open_filesystem(url)
    except (ImportError, ValueError) as error:  # a scheme's package is missing; no such scheme
        raise CorpusError(f"corpus: {url} cannot be opened: {error}") from error


def _match(url: str) -> dict[str, int]:
    filesystem, path = _open_filesystem(url)
    try:
        with as_oserror(url):
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
    others = sorted(name for name, info in matches.items() if info["type"] != "file")
    if not files and path in matches and matches[path]["type"] == "directory":
        raise CorpusError(
            f"corpus: expected tars, got the folder {url}: name those in it, '{url.rstrip('/')}"
            "/*.tar', in quotes"
        )
    if not files:
        raise CorpusError(f"corpus: expected at least one tar at {url}, found none")
    if others:
        logger.warning(
            "corpus: %d matches of %s are no files (folders, dangling links) and left out, such "
            "as %s",
            *(len(others), url, others[0]),
        )
    for name, size in files.items():
        if size is None:
            raise CorpusError(f"corpus: {name}: expected a size in bytes, the server tells none")
    return files


def _whole_url(url: str) -> str:
    filesystem, path = _open_filesystem(url)
    return str(filesystem.unstrip_protocol(path)).rstrip("/")


def _common_root(urls: Iterable[str]) -> str:
    """Return the deepest folder that is above all URLs and holds no glob."""
    paths = [_whole_url(url).split("/")[:-1] for url in urls]
    folders = [list(takewhile(lambda part: not _MAGIC.search(part), path)) for path in paths]
    same = takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))
    return "/".join(names[0] for names in same)


def _task_id(url: str, num_bytes: int, root: str) -> str:
    if root and not url.startswith(root + "/"):
        raise CorpusError(f"corpus: expected every tar below the root {root}, got {url}")
    below = url.removeprefix(root + "/") if root else url.split("://", 1)[-1].lstrip("/")
    stem = _UNSAFE.sub("-", below.rsplit("/", 1)[-1].removesuffix(".tar"))[:_MAX_STEM]
    digest = hashlib.sha256(f"{below}\0{num_bytes}".encode()).hexdigest()[:8]
    return f"{stem}-{digest}"
