"""Lists a corpus, tars named by fsspec URLs, as tasks, and splits long tars into several.

Patterns take braces and globs (``s3://bucket/train-{0000..0999}.tar``). A task's id is the tar's
stem and 12 hex digits over its path below the corpus root, so that a corpus may move as a whole and
keep its ids. The parts of a long tar are ranges of its samples (``parts``), each
with a writer and a commit of its own.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from os.path import commonprefix

from fsspec import AbstractFileSystem

from pipeline.base.remote_copy import open_filesystem
from pipeline.base.secrets import strip_url
from pipeline.corpus.local_listing import expand_local, list_local, tidy_folder
from pipeline.corpus.pattern import MAGIC, CorpusError, Found, Listing, expand_braces
from pipeline.corpus.remote_listing import RemoteLister
from pipeline.store.commit import Marks
from pipeline.store.task_ids import list_part_ids, part_suffix

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_MAX_STEM = 80
_NUM_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Task:
    """One tar, or one part of a long one: the unit of work, commit and retry.

    ``num_bytes`` is the whole tar's; ``part`` is from 0 to ``num_parts`` - 1. ``below`` is the
    tar's path below the corpus root, ``marks`` what the listing told of it. ``fault`` is why it
    cannot be read, or "": a pattern may match what is no readable tar.
    """

    id: str
    url: str
    num_bytes: int
    part: int = 0
    num_parts: int = 1
    below: str = ""
    marks: Marks = field(default_factory=Marks)
    fault: str = ""

    @property
    def tar_id(self) -> str:
        """The id of the whole tar, which all its parts share."""
        return self.id.removesuffix(part_suffix(self.part, self.num_parts))


def list_tasks(patterns: Sequence[str], *, root: str | None = None) -> list[Task]:
    """List the tars that match any of the patterns, sorted by URL, each once.

    What matches and is no readable tar is a task with a ``fault``. ``root`` is the folder that ids
    are relative to; by default the deepest folder without a glob that is above all patterns.

    Raises:
        CorpusError: a pattern matches nothing or has a refused form; nothing that matches can be
            read; two names are those of one file; two tars share an id.
        PermissionError: a storage denies access to what is to be listed.
        OSError: a storage cannot be listed.
    """
    expanded = [expand_local(p) if _is_local(p) else expand_braces(p) for p in patterns]
    listings = _list(chain.from_iterable(expanded))
    if not listings:
        raise CorpusError("corpus: expected at least one pattern, got none")
    found = {tar.name: tar for listing in listings for tar in listing.found}
    _check_readable(found.values())
    _check_names(sorted(found.values(), key=lambda tar: tar.name))
    base = _whole_url(root) if root else _common_root([listing.folder for listing in listings])
    tasks: dict[str, Task] = {}
    for tar in sorted({tar.url: tar for tar in found.values()}.values(), key=lambda tar: tar.url):
        below = _path_below(base, tar.url)
        task = Task(_tar_id(below), tar.url, tar.num_bytes, 0, 1, below, tar.marks, tar.fault)
        if task.id in tasks:
            raise CorpusError(
                f"corpus: {task.url} and {tasks[task.id].url} share the id {task.id} (the same "
                f"path below {base}); give --root, a folder above both"
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
            parts.append(replace(task, id=part_id, part=i, num_parts=num))
    return parts


def _is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://"))


def _open_filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    try:
        return open_filesystem(url)
    except (ImportError, ValueError) as error:  # a scheme's package is missing; no such scheme
        raise CorpusError(f"corpus: {url} cannot be opened: {error}") from error
    except OSError as error:  # FTP and SFTP connect when they are opened
        raise OSError(f"corpus: {strip_url(url)} cannot be opened: {error}") from error


def _list(urls: Iterable[str]) -> list[Listing]:
    """List URLs without braces, those of one file system together."""
    filesystems: dict[str, AbstractFileSystem] = {}
    paths: dict[str, list[str]] = defaultdict(list)
    for url in dict.fromkeys(urls):
        server = "" if _is_local(url) else "/".join(url.split("/")[:3])
        if server not in filesystems:
            filesystems[server] = _open_filesystem(url)[0]
        path = filesystems[server]._strip_protocol(url)
        is_of_folders = not server and url.endswith("/") and MAGIC.search(url)
        paths[server].append(path + "/" if is_of_folders else path)
    listings: list[Listing] = []
    for server, some in paths.items():
        listings += (
            RemoteLister(filesystems[server]).list_tars(some) if server else list_local(some)
        )
    return listings


def _check_readable(found: Iterable[Found]) -> None:
    """Refuse a corpus of which nothing can be read."""
    tars = sorted(found, key=lambda tar: not tar.denied)
    if not all(tar.fault for tar in tars):
        return
    more = f"; and {len(tars) - 1} more" if len(tars) > 1 else ""
    if tars[0].denied:
        raise PermissionError(f"corpus: {tars[0].fault}{more}")
    raise CorpusError(f"corpus: no tar can be read: {tars[0].fault}{more}")


def _check_names(found: Iterable[Found]) -> None:
    """Refuse two names of one file."""
    names: dict[Hashable, str] = {}
    pairs = []
    for tar in found:
        if not tar.fault and names.setdefault(tar.identity, tar.name) != tar.name:
            pairs.append((names[tar.identity], tar.name))
    if pairs:
        more = f" (and {len(pairs) - 1} more such pairs)" if len(pairs) > 1 else ""
        raise CorpusError(
            f"corpus: {pairs[0][0]} and {pairs[0][1]} are one file{more}, by a link or by two "
            "spellings of its path, and would be encoded twice; give patterns that match it once"
        )


def _whole_url(url: str) -> str:
    filesystem, path = _open_filesystem(url)
    if "file" in filesystem.protocol:
        path = tidy_folder(path)
    return str(filesystem.unstrip_protocol(path)).rstrip("/")


def _common_root(folders: Iterable[str]) -> str:
    """Return the deepest folder that is above all of these or one of them."""
    return "/".join(commonprefix([folder.split("/") for folder in folders]))  # noqa: RUF071


def _path_below(root: str, url: str) -> str:
    if root and url == root:  # a folder that cannot be listed
        return "."
    if root and not url.startswith(root + "/"):
        raise CorpusError(f"corpus: expected every tar below the root {root}, got {url}")
    return url.removeprefix(root + "/") if root else url.split("://", 1)[-1].lstrip("/")


def _tar_id(below: str, *hashed: object, num_digits: int = _NUM_DIGITS) -> str:
    """Return the tar's stem and hex digits over its path, and whatever else tells it apart."""
    stem = _UNSAFE.sub("-", below.rsplit("/", 1)[-1].removesuffix(".tar"))[:_MAX_STEM]
    text = "\0".join(map(str, (below, *hashed)))
    return f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:num_digits]}"


def first_tar_id(tar: Task) -> str:
    """Return the id that the first ldznet gave a tar, by its size too."""
    return _tar_id(tar.below, tar.num_bytes, num_digits=8)


def url_tar_id(tar: Task) -> str:
    """Return the id of a tar of another corpus, with the path that one in the store has."""
    return _tar_id(tar.below, tar.url)
