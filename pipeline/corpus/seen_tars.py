"""What is known of tars that were listed again after they were encoded: marks and their SHA-256.

Records are immutable, so the marks of a tar that was copied or touched, and then found to hold the
same bytes, are kept beside the layer's table of records. It is a cache: where it is lost, the tars
are hashed again.
"""

from collections import defaultdict
from collections.abc import Iterable

import pyarrow as pa

from pipeline.corpus.tasks import Task
from pipeline.store.commit import Marks
from pipeline.store.kept_table import KeptTable
from pipeline.store.records import inventory_folder
from pipeline.store.store import Store

_SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("tar_bytes", pa.int64()),
        *((name, pa.string()) for name in Marks.model_fields),
        ("source_sha256", pa.string()),
    ]
)


class SeenTars:
    """SHA-256 of tars by URL, size and marks, of one latents layer's folder."""

    def __init__(self, store: Store, layer: str) -> None:
        self._kept = KeptTable(store.storage, inventory_folder(layer), "tars-1", _SCHEMA)
        self._known: defaultdict[tuple[object, ...], set[str]] = defaultdict(set)
        self._urls: set[str] = set()
        for row in self._kept.read(_SCHEMA.names).to_pylist():
            *listed, sha256 = row.values()
            self._known[tuple(listed)].add(sha256)
            self._urls.add(listed[0])

    def find(self, tar: Task) -> set[str]:
        """Return the SHA-256 that a tar with this URL, size and marks had; mostly none or one.

        There are two where a changed tar was accepted unread.
        """
        return self._known.get(_describe(tar), set())

    def has_url(self, url: str) -> bool:
        """Return whether any marks are kept of the tar at a URL."""
        return url in self._urls

    def add(self, found: Iterable[tuple[Task, str]]) -> None:
        """Keep what tars have, or are taken to have, as SHA-256 (hex)."""
        rows = []
        for tar, sha256 in found:
            described = _describe(tar)
            if sha256 not in self._known[described]:
                self._known[described].add(sha256)
                self._urls.add(tar.url)
                rows.append(dict(zip(_SCHEMA.names, (*described, sha256), strict=True)))
        if rows:
            self._kept.add(pa.Table.from_pylist(rows, schema=_SCHEMA))


def _describe(tar: Task) -> tuple[object, ...]:
    return (tar.url, tar.num_bytes, *dict(tar.marks).values())
