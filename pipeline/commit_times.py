"""When a record was created, by the clock of the storage: a file's mtime, an object's LastModified.

For people to read, never to decide by: clocks are wrong, and a copied store has the copy's times.
"""

import obstore

from pipeline.local_storage import LocalStorage
from pipeline.object_storage import ObjectStorage
from pipeline.storage_interface import Storage


def read_time(storage: Storage, path: str) -> float | None:
    """Return seconds since the epoch, None where the file is gone or the storage does not tell.

    Raises:
        OSError: the storage failed.
    """
    try:
        if isinstance(storage, LocalStorage):
            return storage.local_path(path).stat().st_mtime
        if isinstance(storage, ObjectStorage):
            with storage._errors("look at", path):
                return obstore.head(storage._store, path)["last_modified"].timestamp()
    except FileNotFoundError:
        return None
    return None


def list_times(storage: Storage, folder: str) -> dict[str, float]:
    """Return name → seconds since the epoch of the files in a folder, where a listing tells it.

    On S3 it does, at no cost; on a file system it would take a look at each file.

    Raises:
        OSError: the storage failed.
    """
    if not isinstance(storage, ObjectStorage):
        return {}
    with storage._errors("list", folder):
        pages = obstore.list(storage._store, folder)
        return {
            entry["path"].rsplit("/", 1)[-1]: entry["last_modified"].timestamp()
            for page in pages
            for entry in page
        }
