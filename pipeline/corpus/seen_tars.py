"""What is known of tars that were listed again after they were encoded: marks and their SHA-256.

Records are immutable, so the marks of a tar that was copied or touched, and then found to hold the
same bytes, are kept beside the layer's table of records, and so is the place of one that moved. It
is a cache: where it is lost, the tars are hashed again.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from pipeline.corpus.tasks import Task
from pipeline.store.commit import Marks
from pipeline.store.kept_table import KeptTable
from pipeline.store.records import inventory_folder
from pipeline.store.store import Store

_SCHEMA = pa.schema(
    [
        ("tar_id", pa.string()),
        ("url", pa.string()),
        ("tar_bytes", pa.int64()),
        *((name, pa.string()) for name in Marks.model_fields),
        ("source_sha256", pa.string()),
        ("kept", pa.bool_()),  # the tar was not read: it is taken to have this SHA-256
    ]
)


class SeenTars:
    """SHA-256 of tars by URL, size and marks, of one latents layer's folder.

    ``tar_ids`` has the tar's id by each URL that it was seen at.
    """

    def __init__(self, store: Store, layer: str) -> None:
        self._files = KeptTable(store.storage, inventory_folder(layer), "tars-1", _SCHEMA)
        self._known: defaultdict[tuple[object, ...], set[str]] = defaultdict(set)
        self.tar_ids: dict[str, str] = {}
        for row in self._files.read(_SCHEMA.names).to_pylist():
            self._remember(row)

    def _remember(self, row: dict[str, Any]) -> bool:
        """Return whether a row says something new."""
        tar_id, url, *listed, sha256, kept = row.values()
        known = self._known[(kept, url, *listed)]
        is_new = sha256 not in known or url not in self.tar_ids
        known.add(sha256)
        self.tar_ids[url] = tar_id
        return is_new

    def find(self, tar: Task) -> set[str]:
        """Return the SHA-256 that a tar with this URL, size and marks had; mostly none or one."""
        return self._known.get((False, *_describe(tar)), set())

    def find_kept(self, tar: Task) -> set[str]:
        """Return the SHA-256 of what is stored of tars that changed and were accepted unread."""
        return self._known.get((True, *_describe(tar)), set())

    def add(self, found: Iterable[tuple[Task, str]], *, kept: bool = False) -> None:
        """Keep what tars have as SHA-256 (hex), or, where ``kept``, are taken to have."""
        rows = [
            dict(zip(_SCHEMA.names, (tar.tar_id, *_describe(tar), sha256, kept), strict=True))
            for tar, sha256 in found
        ]
        fresh = [row for row in rows if self._remember(row)]
        if fresh:
            self._files.add(pa.Table.from_pylist(fresh, schema=_SCHEMA))


def _describe(tar: Task) -> tuple[object, ...]:
    return (tar.url, tar.num_bytes, *dict(tar.marks).values())
