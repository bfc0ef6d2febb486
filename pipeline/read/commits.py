"""The commits that a reader reads, a layer each, by the number of their task.

Opening reads the store's table of records and no record. A record is read and compared with its
row of the table when something of its task is first opened.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.lru_cache import LruCache
from pipeline.base.yaml import SpecError
from pipeline.spec.layer import LayerSpec
from pipeline.store.commit import Commit, DamagedStoreError, RecordName, read_commit
from pipeline.store.records import RecordTable, inventory_folder
from pipeline.store.store import Store

_COUNTS = ("pairs", "masks", "ignores")
_DIGESTS = ("pairs_sha256", "source_sha256")
_NUM_KEPT = 1024  # commits, of 30 KB: a task's arrays are opened one after another


class LayerCommits:
    """The commits of some records of a layer. Threads may share it.

    ``records`` are by task number, and so are ``num_pairs``, ``num_masks`` and ``num_ignores``
    (tasks,) int64, and ``pairs_sha256`` and ``source_sha256``, of the tar, (tasks,) strings, which
    are what the table of records says.

    Raises:
        DamagedStoreError: a record that the table does not know cannot be read.
    """

    def __init__(self, store: Store, layer: LayerSpec, records: Sequence[RecordName]) -> None:
        self.layer = layer
        self.records = tuple(records)
        self._store = store
        self._commits: LruCache[int, Commit] = LruCache(_NUM_KEPT)
        table = RecordTable(store, layer.folder, (*_COUNTS, *_DIGESTS))
        table.read(self.records)
        rows = table.select(self.records).combine_chunks()
        self.num_pairs, self.num_masks, self.num_ignores = (rows[x].to_numpy() for x in _COUNTS)
        self.pairs_sha256: pa.Array
        self.pairs_sha256, self.source_sha256 = (rows[x].combine_chunks() for x in _DIGESTS)

    def read(self, task: int) -> Commit:
        """Return a task's commit; the last used are kept.

        Raises:
            DamagedStoreError: it cannot be read, or is not what the table of records says.
        """
        return self._commits.get_or_make(task, lambda: self._read(task))

    def _read(self, task: int) -> Commit:
        commit = read_commit(self._store.storage, self.layer.folder, self.records[task])
        counts = (self.num_pairs, self.num_masks, self.num_ignores)
        expected = [int(count[task]) for count in counts], self.pairs_sha256[task].as_py()
        found = [commit.rows[name] for name in _COUNTS], commit.pairs_sha256
        if found != expected:
            raise DamagedStoreError(
                f"{commit.name}: the table of records says {expected[0]} {', '.join(_COUNTS)} of "
                f"SHA-256 {expected[1][:12]}…, but the record {found[0]} of {found[1][:12]}…; the "
                f"table is a cache: remove {inventory_folder(self.layer.folder)} and start again"
            )
        return commit


def open_features(
    store: Store, layer: LayerSpec, records: Sequence[RecordName], latents: LayerCommits
) -> LayerCommits:
    """Return the features commits over the tasks of a latents layer, by the same numbers.

    Raises:
        SpecError: a task has none.
        DamagedStoreError: one is of other pairs than its latents.
    """
    over = {record.task: record for record in records}
    missing = next((record.task for record in latents.records if record.task not in over), None)
    if missing is not None:
        raise SpecError(
            f"{layer.folder}: task {missing} has latents but no features of the same content; "
            "run encode with this features layer's spec to add them; it needs no --corpus"
        )
    features = LayerCommits(store, layer, [over[record.task] for record in latents.records])
    differs = pc.not_equal(features.pairs_sha256, latents.pairs_sha256)
    task = pc.index(differs, True).as_py()
    if task >= 0:
        raise DamagedStoreError(
            f"{features.read(task).name}: its rows are not those of {latents.read(task).name}"
        )
    return features


@contextmanager
def telling_of_repair(store: Store, layers: Iterable[str]) -> Iterator[None]:
    """In the block, an error about damage also says how it is repaired, or that a layer is gone."""
    try:
        yield
    except DamagedStoreError as error:
        for layer in layers:
            store.check_there(layer)
        if "--repair" in str(error):
            raise
        raise DamagedStoreError(
            f"{error}. To repair it: ldznet verify {store.storage.url} --report FILE, then the "
            "encode command of this store with --repair FILE; then run this one again, train with "
            "--resume: it reads the repair"
        ) from error
