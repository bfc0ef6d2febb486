"""Opens the storage of a store's URL, and tests before a run that records have one writer."""

import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from urllib.parse import unquote, urlsplit

from pipeline.base.outages import OutageError
from pipeline.storage.interface import Storage, StorageError, remove_leftovers
from pipeline.storage.local import LocalStorage
from pipeline.storage.s3 import ObjectStorage

NUM_RACERS = 8
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def open_storage(url: str) -> Storage:
    """Return the storage at a path, a ``file://`` URL or an ``s3://bucket/prefix`` URL.

    Asks no server. Errors never show a URL of another form, which may hold a secret.

    Raises:
        ValueError: no path, a path that is or leads through a file, or another kind of URL.
    """
    found = _SCHEME.match(url)
    scheme = found[1].lower() if found else ""
    if "::" in url or scheme not in ("", "file", "s3"):
        raise ValueError(
            f"store: expected a local path, file:///path or s3://bucket/prefix, got a URL of "
            f"scheme {scheme!r}; chained URLs are refused, and other storages are not known to "
            "give a record one writer"
        )
    if scheme == "s3":
        return ObjectStorage(url)
    if not scheme:
        path = url
    else:
        parts = urlsplit(url)
        path = unquote(parts.path)
        if parts.netloc or parts.query or parts.fragment:
            path = ""
    if not path:
        raise ValueError("store: expected a path, file:///path or s3://bucket/prefix")
    folder = Path(path).expanduser()
    there = next((above for above in (folder, *folder.absolute().parents) if above.exists()), None)
    if there is not None and not there.is_dir():
        raise ValueError(f"store: expected a folder or s3:// URL, got {url}: {there} is a file")
    return LocalStorage(folder)


def list_asks(storage: Storage) -> list[Callable[[], object]]:
    """Return a small request for ``outages.watching``; none of a file system, which answers."""
    return [partial(storage.exists, "spec.json")] if isinstance(storage, ObjectStorage) else []


def check_create(storage: Storage) -> None:
    """Refuse a storage where a record could have two writers, before anything is written to it.

    Several threads race to create one new name, each with content of its own, and one more comes
    late. At most one may be told that it won, and the name must hold what that one wrote. (None is
    told if the winner's first answer was lost.)

    Raises:
        StorageError: several won, or the name holds something else; says which.
        PermissionError: the storage may not be written.
    """
    folder = f"probes/{secrets.token_hex(8)}"
    name = f"{folder}/record"
    contents = [f"{folder} racer {number}".encode() for number in range(NUM_RACERS + 1)]
    start = Barrier(NUM_RACERS)

    def race(content: bytes) -> bool:
        start.wait()
        return storage.create(name, content)

    try:
        with ThreadPoolExecutor(NUM_RACERS) as pool:
            told = list(pool.map(race, contents[:-1]))
        told.append(storage.create(name, contents[-1]))
        there = storage.read(name)
    except (PermissionError, OutageError):
        raise
    except OSError as error:
        raise StorageError(
            f"{storage.url}: refused to write: no record could be created there: {error}. A store "
            f"needs {storage.create_needs}"
        ) from error
    finally:
        remove_leftovers(storage, folder)
    winners = {content for content, won in zip(contents, told, strict=True) if won}
    if there not in contents or not winners <= {there}:
        raise StorageError(
            f"{storage.url}: refused to write: {NUM_RACERS + 1} writers created one record and "
            f"{len(winners)} were told that they had; a task could be committed twice. A store "
            f"needs {storage.create_needs}"
        )
