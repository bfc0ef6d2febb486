"""What has a name on a file system of this machine: a tar, or something in its place."""

import errno
import os
import re
import stat
from functools import lru_cache

from pipeline.corpus.pattern import Found, explain_folder
from pipeline.store.commit import Marks

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)
"""Errors of a path that is not there."""
_SPELLING = re.compile(r"//|/\.{1,2}(?=/|$)")
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def exists(path: str) -> bool:
    """Whether something has this name, were it a link that leads nowhere; unsure is True."""
    try:
        os.lstat(path)
    except ValueError:  # a NUL
        return False
    except OSError as error:
        return error.errno not in ABSENT
    return True


def look_at(name: str) -> Found:
    """Look at an absolute path, through links; what is no tar that can be listed has a fault."""
    try:
        status = os.stat(name)
    except OSError as error:
        return explain_error(name, error, wanted="a tar")
    shown = _show(name)
    url = "file://" + tidy_path(shown)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        return Found(name, url, fault=explain_folder(shown))
    if kind != stat.S_IFREG:
        fault = f"{shown}: expected a tar, got {_KINDS.get(kind, 'no file')}; remove it from there"
        return Found(name, url, fault=fault)
    if shown != name or "::" in name:
        held = "'::', which URLs may not hold" if shown == name else "bytes that are not UTF-8"
        return Found(name, url, fault=f"{shown}: its name holds {held}; rename it")
    return Found(
        name,
        url,
        status.st_size,
        Marks(mtime=str(status.st_mtime_ns)),
        # The inode tells; size and time are there for file systems that number them badly.
        (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns),
    )


def explain_error(name: str, error: OSError, *, wanted: str) -> Found:
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
    fault = f"{shown}: expected {wanted}, got {got}"
    return Found(name, "file://" + tidy_path(shown), fault=fault)


def _show(name: str) -> str:
    """Return a name as text that can be stored and printed."""
    shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return shown.rstrip("/")  # of a pattern that wants folders


def tidy_path(path: str) -> str:
    """Return an absolute path without ``//``, ``.`` and ``..``; other links stay as they are."""
    if not _SPELLING.search(path):
        return path
    folder, _, name = path.rpartition("/")
    if name in ("", ".", ".."):
        return _tidy_folder(path)
    return _tidy_folder(folder).rstrip("/") + "/" + name


@lru_cache(maxsize=4096)
def _tidy_folder(folder: str) -> str:
    """As ``tidy_path``; where ``..`` stands behind a link, it is the folder above its target."""
    plain = "/" + os.path.normpath(folder).lstrip("/")
    try:
        same = os.path.samefile(plain, folder or "/")
    except OSError:
        same = False
    return plain if same else os.path.realpath(folder)
