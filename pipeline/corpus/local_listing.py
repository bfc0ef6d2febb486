"""Lists tars on file systems of this machine: as Python's ``glob``, but nothing is lost silently.

A pattern follows links to files and folders, ``**`` is any number of folders, and ``*`` matches no
hidden name. What exists literally is literal. Unlike ``glob``, a folder that cannot be listed and a
link that leads nowhere are found, with a fault.
"""

import errno
import fnmatch
import glob
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain

from pipeline.corpus.pattern import (
    MAGIC,
    CorpusError,
    Found,
    Listing,
    expand_braces,
    explain_folder,
    find_none,
)
from pipeline.store.commit import Marks
from pipeline.store.read_many import read_many

logger = logging.getLogger(__name__)
_AT_ONCE = 65536
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)
"""Errors of a path that is not there."""
_SPELLING = re.compile(r"//|/\.{1,2}(?=/|$)")
_PROTOCOL = re.compile(r"(?:(?:file|local):(?://)?)?")
# What a link that leads nowhere led to is told by its name: a folder, unless it is one of these.
_FILE_NAME = re.compile(
    r"\.(jsonl?|txt|[ct]sv|parquet|arrow|np[yz]|pkl|pth?|safetensors|md|html?|xml|ya?ml|toml|log|lock"
    r"|idx|jpe?g|png|webp|gif|tiff?|mp4|pdf|py|sh|tar|t?gz|bz2|xz|zst|zip|sha256|md5)$",
    re.IGNORECASE,
)
_SYSTEMS_OWN = "lost+found"  # of a disk, and root's alone


def expand_local(pattern: str) -> list[str]:
    """Expand the braces of a local pattern, except in the part that exists as it is written."""
    start = _PROTOCOL.match(pattern).end()  # type: ignore[union-attr]  # matches the empty text
    if re.search(r"[{}\\]", pattern):
        slashes = [at for at, letter in enumerate(pattern) if letter == "/" and at > start]
        for end in (len(pattern), *reversed(slashes)):
            if _exists(os.path.expanduser(pattern[start:end])):
                with suppress(CorpusError):  # unbalanced braces are no pattern
                    _warn_of_others(pattern[start:end], expand_braces(pattern[start:end]))
                return expand_braces(pattern, num_literal=end)
    return expand_braces(pattern)


def list_local(paths: Sequence[str]) -> list[Listing]:
    """List what absolute paths and globs match, in their order.

    Raises:
        CorpusError: one of them matches nothing, or is a folder.
    """
    matches = [_Matcher(path).match() for path in paths]
    names = {name: None for _, found, _ in matches for name in found}
    looked = chain.from_iterable(read_many(_look_at, list(names), at_once=_AT_ONCE))
    described = {found.name: found for found in looked}
    listings = []
    for path, (folder, found, faults) in zip(paths, matches, strict=True):
        if not found and not faults:
            raise find_none(path)
        if found == [path] and described[path].fault and os.path.isdir(path):
            raise CorpusError(f"corpus: {explain_folder(path)}")
        faulty = [_explain(name, error, wanted="a folder") for name, error in faults.items()]
        url = "file://" + tidy_folder(folder).rstrip("/")
        listings.append(Listing(url, [*(described[name] for name in found), *faulty]))
    return listings


@lru_cache(maxsize=4096)
def tidy_folder(folder: str) -> str:
    """Return an absolute folder without ``//``, ``.`` and ``..``; other links stay as they are.

    Where ``..`` stands behind a link, it is the folder above its target.
    """
    if not _SPELLING.search(folder):
        return folder
    plain = "/" + os.path.normpath(folder).lstrip("/")
    with suppress(OSError):
        if os.path.samefile(plain, folder):
            return plain
    return os.path.realpath(folder)


class _Matcher:
    """Matches one pattern."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._faults: dict[str, OSError] = {}  # by folder that could not be listed

    def match(self) -> tuple[str, list[str], dict[str, OSError]]:
        """Return the literal folder, the names that match, and the folders that may hold more."""
        head, *rest = self._path.split("/")
        while rest and (not MAGIC.search(rest[0]) or self._is_literal(head, rest[0])):
            head += "/" + rest.pop(0)
        if not rest:
            return head.rpartition("/")[0], [head] if _exists(head) else [], {}
        heads = [head]
        for at, part in enumerate(rest):
            is_last = at == len(rest) - 1
            heads = [name for above in heads for name in self._step(above, part, is_last)]
        return head, list(dict.fromkeys(heads)), self._faults

    def _is_literal(self, head: str, part: str) -> bool:
        """Whether a name with ``[`` exists as it is written, and as a pattern is another one.

        What ``*`` and ``?`` match includes the name as it is written.
        """
        if "[" not in part or fnmatch.fnmatchcase(part, part) or not _exists(f"{head}/{part}"):
            return False
        _warn_of_others(f"{head}/{part}", [f"{glob.escape(head)}/{part}"])
        return True

    def _step(self, head: str, part: str, is_last: bool) -> Iterator[str]:
        """Yield what a pattern's next name matches in a folder."""
        if part == "**":
            yield from self._walk(head, files=is_last)
        elif MAGIC.search(part) and not self._is_literal(head, part):
            matches = re.compile(fnmatch.translate(part)).match
            for entry in self._scan(head):
                if entry.name.startswith(".") and not part.startswith("."):
                    continue
                if matches(entry.name) and (is_last or not entry.is_file(follow_symlinks=False)):
                    yield f"{head}/{entry.name}"
        else:
            try:
                os.lstat(f"{head}/{part}")
            except OSError as error:
                self._note(head, error)
            else:
                yield f"{head}/{part}"

    def _walk(
        self, folder: str, *, files: bool, above: tuple[os.stat_result, ...] = ()
    ) -> Iterator[str]:
        """Yield all folders below one and itself, or all files; links are followed.

        A folder inside itself, by a link, is not entered again: its files are found already.
        """
        try:
            here = os.stat(folder or "/")
        except OSError as error:
            self._note(folder, error)
            return
        if any(os.path.samestat(here, other) for other in above):
            return
        if not files:
            yield folder
        for entry in self._scan(folder):
            path = f"{folder}/{entry.name}"
            if entry.name.startswith("."):
                continue
            if _may_be_folder(entry, strict=files):
                yield from self._walk(path, files=files, above=(*above, here))
            elif files:
                yield path

    def _scan(self, folder: str) -> list[os.DirEntry[str]]:
        """List a folder; one that cannot be listed is empty, and noted."""
        try:
            with os.scandir(folder or "/") as entries:
                return list(entries)
        except OSError as error:
            self._note(folder, error)
            return []

    def _note(self, folder: str, error: OSError) -> None:
        """Note an error met in a folder, unless it says that nothing is there, or no folder is."""
        name = folder.rpartition("/")[2]
        is_link = os.path.islink(folder) and not os.path.isdir(folder)
        if error.errno in _ABSENT and (error.errno == errno.ENOTDIR or not is_link):
            return
        if (is_link and _FILE_NAME.search(name)) or name == _SYSTEMS_OWN:
            return
        self._faults[folder] = error


def _may_be_folder(entry: os.DirEntry[str], *, strict: bool) -> bool:
    """Whether an entry is a folder, or (unless ``strict``) a link that leads nowhere."""
    with suppress(OSError):  # a circle of links, or no permission
        lost = not strict and entry.is_symlink() and not os.path.exists(entry.path)
        return lost or entry.is_dir()
    return not strict


def _warn_of_others(literal: str, patterns: Sequence[str]) -> None:
    found = {name for pattern in patterns for name in glob.iglob(pattern, recursive=True)}
    if others := sorted(found - {literal}):
        logger.warning(
            "corpus: %s exists and is taken by its name; as a pattern it would match %d others, "
            "which are left out, such as %s",
            *(literal, len(others), others[0]),
        )


def _exists(path: str) -> bool:
    """Whether something has this name, were it a link that leads nowhere; unsure is True."""
    try:
        os.lstat(path)
    except ValueError:  # a NUL
        return False
    except OSError as error:
        return error.errno not in _ABSENT
    return True


def _look_at(name: str) -> Found:
    """Look at an absolute path, through links; what is no tar that can be listed has a fault."""
    try:
        status = os.stat(name)
    except OSError as error:
        return _explain(name, error, wanted="a tar")
    shown = _show(name)
    fault = ""
    if stat.S_ISDIR(status.st_mode):
        fault = explain_folder(shown)
    elif not stat.S_ISREG(status.st_mode):
        fault = f"{shown}: expected a tar, got a named pipe, a socket or a device; remove it"
    elif shown != name or "::" in name:
        held = "'::', which URLs may not hold" if shown == name else "bytes that are not UTF-8"
        fault = f"{shown}: its name holds {held}; rename it"
    if fault:
        return Found(name, _make_url(shown), fault=fault)
    # The inode tells; size and time are there for file systems that number them badly.
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    marks = Marks(mtime=str(status.st_mtime_ns))
    return Found(name, _make_url(name), status.st_size, marks, identity)


def _explain(name: str, error: OSError, *, wanted: str) -> Found:
    """Return what could not be looked at or listed, with why and what to do."""
    shown = _show(name)
    if error.errno == errno.ELOOP:
        got = "links that lead in a circle; remove them, or restore what they led to"
    elif isinstance(error, FileNotFoundError) and os.path.islink(name):
        target = _show(os.readlink(name))
        got = f"a link to {target}, where nothing is; restore that, or remove the link"
    elif isinstance(error, PermissionError):
        got = "permission denied; let the user who encodes read it"
    else:
        got = f"{error.strerror}; see whether the file system is well"
    return Found(name, _make_url(shown), fault=f"{shown}: expected {wanted}, got {got}")


def _show(name: str) -> str:
    """Return a name as text that can be stored and printed."""
    shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return shown.rstrip("/")  # of a pattern that wants folders


def _make_url(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"file://{tidy_folder(folder).rstrip('/')}/{name}"
