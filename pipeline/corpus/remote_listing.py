"""Lists tars by fsspec, where a pattern means what fsspec's ``glob`` means.

Unlike ``glob``, which takes any error of a folder for "nothing is there", this raises it. The
folders of a level are listed at once, by threads, and so are tars asked whose size a listing does
not tell (HTTP).
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import chain
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.utils import glob_translate

from pipeline.base.remote_copy import as_oserror, retry
from pipeline.base.secrets import find_url_fault, hide_secrets, strip_url
from pipeline.corpus.http_files import identify_url, read_head, resolve_dots
from pipeline.corpus.pattern import (
    MAGIC,
    CorpusError,
    Found,
    Listing,
    explain_folder,
    find_none,
)
from pipeline.store.commit import Marks
from pipeline.store.read_many import read_many

_PAGE = 1000
"""Names in one answer of a listing: more tars than that in one folder are not asked one by one."""
_AT_ONCE = 65536
_NO_FILE = "expected a tar, got no file, or a link that leads nowhere; remove it"
_NO_SIZE = (
    "expected a size in bytes, the server tells none (neither Content-Length to a HEAD nor "
    "Content-Range to a GET of the first byte); copy the tar to a storage that does"
)
_KINDS = ("file", "directory")
Info = dict[str, Any]
T = TypeVar("T")


class RemoteLister:
    """Lists tars of one fsspec file system; lists anew what another has listed before."""

    def __init__(self, filesystem: AbstractFileSystem) -> None:
        self._filesystem = filesystem
        self._is_http = "http" in filesystem.protocol
        self._absent = ""  # why the last folder was not there
        filesystem.invalidate_cache()

    def list_tars(self, paths: Sequence[str]) -> list[Listing]:
        """List what paths and globs of the file system match, in their order.

        Raises:
            CorpusError: one of them matches nothing, is a folder, or is no glob.
            PermissionError: access to a folder is denied.
            OSError: a folder cannot be listed.
        """
        splits = [self._split(path) for path in paths]
        tars = self._look([literal for literal, rest in splits if not rest])
        listings = []
        for path, (literal, rest) in zip(paths, splits, strict=True):
            folder = literal if rest else literal.rpartition("/")[0]
            if rest:
                found = self._glob(literal, rest)
            else:
                found = [tars[literal]] if literal in tars else []
            if not found:
                # A library's sentence, such as that there is no such bucket, and no mere path.
                reason = f": {hide_secrets(self._absent)}" if " " in self._absent else ""
                raise find_none(self._name(path) + reason)
            listings.append(Listing(self._name(folder).rstrip("/"), found))
        return listings

    def _name(self, path: str) -> str:
        url = str(self._filesystem.unstrip_protocol(path))
        return resolve_dots(url) if self._is_http else url

    def _split(self, path: str) -> tuple[str, list[str]]:
        """Split into the part that is literal and the names behind it, of which the first is not.

        Names with ``[`` before any ``*`` and ``?`` are literal if that path exists: one request.
        """
        parts = path.split("/")
        globs = [at for at, part in enumerate(parts) if MAGIC.search(part)]
        if not globs:
            return path, []
        wild = next((at for at in globs if re.search(r"[*?]", parts[at])), len(parts))
        literal = "/".join(parts[: max((at for at in globs if at < wild), default=-1) + 1])
        if literal and self._ask_info(literal) is not None:
            return "/".join(parts[:wild]), parts[wild:]
        return "/".join(parts[: globs[0]]), parts[globs[0] :]

    def _look(self, paths: Sequence[str]) -> dict[str, Found]:
        """Look at tars that are named literally; those that are not there are left out."""
        infos: dict[str, Info | OSError | None] = {}
        folders = defaultdict(list)
        for path in paths:
            folders[path.rpartition("/")[0]].append(path)
        for folder, named in folders.items():
            if len(named) <= _PAGE or self._is_http:
                continue
            with suppress(PermissionError):  # who may read and not list asks one by one
                listed = {info["name"].rstrip("/"): info for info in self._ask_folder(folder)}
                infos.update((path, listed.get(path)) for path in named)
        infos |= self._try_infos([path for path in paths if path not in infos])
        found = {}
        for path in paths:
            info = infos[path]
            if isinstance(info, dict) and info["type"] == "directory":
                raise CorpusError(f"corpus: {explain_folder(self._name(path))}")
            if info is not None:
                found[path] = self._describe(path, info)
        return found

    def _glob(self, folder: str, names: list[str]) -> list[Found]:
        try:
            matches = dict(self._match(folder, names))
        except ValueError as error:  # also of a ** that is not a whole name
            raise CorpusError(
                f"corpus: {self._name('/'.join([folder, *names]))}: {error}"
            ) from error
        unsized = [
            name
            for name, info in matches.items()
            if info["size"] is None and info["type"] == "file" and not find_url_fault(name)
        ]
        answers: dict[str, Info | OSError | None] = {**matches, **self._try_infos(unsized)}
        gone = "it is listed, but not there; see whether the server's listing is up to date"
        return [
            self._describe(path, info or FileNotFoundError(f"{self._name(path)}: {gone}"))
            for path, info in answers.items()
        ]

    def _match(self, root: str, names: list[str]) -> Iterator[tuple[str, Info]]:
        """Yield what matches below a folder, with what the listing tells of it."""
        matches = [
            re.compile(glob_translate("/".join(names[: depth + 1]))).match
            for depth in range(len(names))
        ]
        if not root and _lists_flat(self._filesystem):
            raise ValueError("the name of a bucket cannot be a pattern")
        wild = names.index("**") if "**" in names else len(names)
        if wild < len(names) and _lists_flat(self._filesystem):
            with suppress(FileNotFoundError):  # as below
                self._ask(lambda: self._filesystem.find(root), root)  # fills the cache of listings
        level, seen = [root], set[tuple[str, bool]]()
        while level:
            (listed,) = read_many(self._ask_folder, level, at_once=len(level))
            level = []
            for info in (info for infos in listed for info in infos):
                name = info["name"].rstrip("/")
                below = name.removeprefix(root).lstrip("/")
                depth = below.count("/")
                is_folder = info["type"] == "directory"
                entry = (name, is_folder)  # a page may link a folder with and without its slash
                if not below or not name.startswith(root) or entry in seen:
                    continue
                if below.rpartition("/")[2].startswith(("?", "#")):  # Apache's other orders of it
                    continue
                seen.add(entry)
                if matches[-1](below) and not (is_folder and names[-1] == "**"):
                    yield name, info
                if is_folder and (
                    depth >= wild or (depth < len(names) - 1 and matches[depth](below))
                ):
                    level.append(name)

    def _ask_folder(self, folder: str) -> list[Info]:
        """List a folder; one that is not there is empty."""
        try:
            path = f"{folder}/" if self._is_http else folder  # servers' links are relative to that
            listed = self._ask(lambda: self._filesystem.ls(path, detail=True), folder)
        except FileNotFoundError as error:
            self._absent = str(error)
            return []
        return [  # what a link leads to, where a file system has them (SFTP)
            info if info["type"] in _KINDS else (self._ask_info(name) or info) | {"name": name}
            for info, name in ((info, info["name"]) for info in listed)
        ]

    def _try_infos(self, paths: Sequence[str]) -> dict[str, Info | OSError | None]:
        """Ask for many; an access that is denied is returned, since it is of one tar alone."""

        def try_one(path: str) -> Info | OSError | None:
            try:
                return self._ask_info(path)
            except PermissionError as error:
                return error

        asked = chain.from_iterable(read_many(try_one, paths, at_once=_AT_ONCE))
        return dict(zip(paths, asked, strict=True))

    def _ask_info(self, path: str) -> Info | None:
        """Ask for one tar or folder; None if it is not there."""
        try:
            if self._is_http:
                return self._ask(
                    lambda: sync(self._filesystem.loop, read_head, self._filesystem, path), path
                )
            return self._ask(lambda: self._filesystem.info(path), path)
        except FileNotFoundError:
            return None

    def _ask(self, action: Callable[[], T], path: str) -> T:
        url = strip_url(self._name(path))

        def act() -> T:
            try:
                with as_oserror(url):
                    return action()
            except OSError as error:
                is_denied = isinstance(error, PermissionError)
                if not is_denied and not str(error).startswith("Forbidden"):  # GCS
                    raise
                raise PermissionError(
                    f"{url}: access denied: {hide_secrets(str(error))}; see which credentials are "
                    "in use and whether they may list and read there"
                ) from error

        return retry(act, what=url)

    def _describe(self, path: str, info: Info | OSError) -> Found:
        name, url = str(self._filesystem.unstrip_protocol(path)), self._name(path)
        if isinstance(info, OSError):
            return Found(name, url, fault=str(info), denied=isinstance(info, PermissionError))
        if info["type"] == "directory":
            return Found(name, url, fault=explain_folder(url))
        if info["type"] != "file":
            return Found(name, url, fault=f"{url}: {_NO_FILE}")
        if fault := find_url_fault(url):
            shown = strip_url(url)
            return Found(shown, shown, fault=f"{shown}: {fault}")
        if info["size"] is None:
            return Found(name, url, fault=f"{url}: {_NO_SIZE}")
        size = int(info["size"])
        identity = identify_url(url, size) if self._is_http else url
        return Found(name, url, size, _read_marks(info), identity)


def _lists_flat(filesystem: AbstractFileSystem) -> bool:
    """Whether a file system has a listing of all that is below a folder in one go (S3, GCS)."""
    return isinstance(filesystem, AsyncFileSystem) and (
        type(filesystem)._find is not AsyncFileSystem._find
    )


def _read_marks(info: Info) -> Marks:
    """Return what a listing tells of a tar beside its size."""

    def find(*names: str) -> str | None:
        held = (info[name] for name in names if info.get(name) not in (None, "", "null"))
        value = next(held, None)
        if isinstance(value, datetime):  # in seconds, as S3's HEAD tells it; its LIST tells more
            value = value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return None if value is None else str(value).replace('"', "")

    return Marks(
        mtime=find(
            *("LastModified", "last_modified", "updated", "Last-Modified", "mtime", "modified")
        ),
        etag=find("ETag", "etag", "blob_id"),
        version=find("VersionId", "version_id", "generation"),
    )
