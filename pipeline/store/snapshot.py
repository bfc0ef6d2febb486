"""Snapshots: frozen lists of the commits that a run reads, named by the digest of their content.

``snapshots/<digest>.json`` lists (task, generation) of each layer, so that a run reads the same
data again whatever was committed since. It is in the store, where ``gc`` and ``rm`` see it; a run
over a store that may not be written keeps it in its own folder.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.base.outages import OutageError
from pipeline.base.whole_file import write_whole
from pipeline.base.yaml import SpecError
from pipeline.spec.layer import SCHEMA_VERSION
from pipeline.store.commit import DamagedStoreError, RecordName
from pipeline.store.current import find_repairs, list_layers_current
from pipeline.store.store import Store, check_version
from pipeline.store.task_ids import name_some

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A frozen list of commits: layer folder → the records that a run reads.

    ``refused`` is why the store did not take it where it was to be written there, else empty.
    """

    digest: str
    records: Mapping[str, tuple[RecordName, ...]]
    refused: str = ""

    def list_missing(self, layers: Iterable[str]) -> list[str]:
        """The folders of ``layers`` that it does not hold, sorted."""
        return sorted(set(layers) - set(self.records))

    def require(self, layers: Iterable[str], *, option: str, reader: str, other: str = "") -> None:
        """Check that it holds the folders of the layers that a run reads.

        The error names the ``option`` that asked for it (``--snapshot``), the ``reader`` (``the
        sweep``), and an ``other`` way out than a snapshot of every layer.

        Raises:
            SpecError: a layer is not in it.
        """
        missing = self.list_missing(layers)
        if missing:
            raise SpecError(
                f"{option}: {self.digest} holds {', '.join(sorted(self.records))}, without "
                f"{', '.join(missing)}, which {reader} reads; take a snapshot of every layer{other}"
            )


def create_snapshot(store: Store, layers: Iterable[str], *, write: bool = True) -> Snapshot:
    """Freeze the current commits of some layers; ``write`` keeps them for ``read_snapshot``.

    Where the store may not be written the snapshot's ``refused`` says so. Retired tasks are left
    out, and features of another content than their latents.
    """
    current = list_layers_current(store, map(store.read_layer, layers))
    records = {
        layer: tuple(record for _, record in sorted(found.current.items()))
        for layer, found in current.items()
    }
    return make_snapshot(store, records, write=write)


def make_snapshot(
    store: Store, records: Mapping[str, tuple[RecordName, ...]], *, write: bool = True
) -> Snapshot:
    """Freeze some layers' commits, each sorted by task; ``write`` as for ``create_snapshot``."""
    data = _serialize(records)
    digest, refused = _digest(data), ""
    if write:
        try:
            store.storage.write_content(_name(digest), data)
        except OutageError:
            raise
        except OSError as error:  # to be read, a store need not be written
            refused = str(error)
    return Snapshot(digest, records, refused)


def keep_snapshot(store: Store, snapshot: Snapshot, out: Path) -> None:
    """Keep a snapshot that the store refused in a run's folder, and warn that it is there.

    Raises:
        OSError: the folder cannot be written.
    """
    if snapshot.refused:
        path = out / _name(snapshot.digest)
        if not path.exists():
            write_whole(path, _serialize(snapshot.records))
        logger.warning(
            "%s: its snapshot %s could not be written there (%s) and is kept as %s. ldznet gc and "
            "rm of that store do not see it: what it names must stay until the run has ended",
            *(store.storage.url, snapshot.digest, snapshot.refused, path),
        )


def _name(digest: str) -> str:
    return f"snapshots/{digest}.json"


def _serialize(records: Mapping[str, tuple[RecordName, ...]]) -> bytes:
    content = {"schema_version": SCHEMA_VERSION, "records": dict(records)}
    return json.dumps(content, sort_keys=True).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def list_snapshots(store: Store) -> list[str]:
    """Return the digests of a store's snapshots, sorted."""
    names = store.storage.list_names("snapshots")
    return sorted(name.removesuffix(".json") for name in names if not name.startswith("."))


def read_snapshot(store: Store, digest: str, *, out: Path | None = None) -> Snapshot:
    """Read a snapshot back, from the store or from a run's folder.

    ``out`` is that folder or one below it, such as a checkpoint's or that of a sweep's trial.

    Raises:
        SpecError: no such snapshot, or one of a later version of ldznet.
        DamagedStoreError: its content does not have the digest it is named by.
    """
    path = _name(digest)
    try:
        data = store.storage.read(path)
    except OutageError:
        raise
    except OSError as error:  # not there, or not to be read by who may not write it either
        folder = None if out is None else out.resolve()
        above = (folder, *folder.parents) if folder else ()
        kept = next((found for x in above if (found := x / path).is_file()), None)
        if kept is None:
            if not isinstance(error, FileNotFoundError):
                raise
            raise SpecError(
                f"{store.storage.url}: holds no snapshot {digest!r}"
                + (f", and there is none in snapshots/ of {folder} or above it" if folder else "")
            ) from error
        data = kept.read_bytes()
    if _digest(data) != digest:
        raise DamagedStoreError(f"{path}: its content has another digest than its name")
    plain = json.loads(data)
    check_version(f"{store.storage.url}/{path}", plain["schema_version"])
    records = {
        layer: tuple(map(RecordName._make, listed)) for layer, listed in plain["records"].items()
    }
    return Snapshot(digest, records)


def take_repairs(store: Store, snapshot: Snapshot, layers: Iterable[str]) -> Snapshot:
    """Return a snapshot with the repairs of what it names in some layers, under the same digest.

    A repair has the content of what it replaces, which is damaged; so a run goes on over it as if
    nothing had been. A renewed task stays as it was. Which tasks were repaired is logged. Raises as
    ``list_layers_current``.
    """
    pinned = {layer: snapshot.records[layer] for layer in layers if layer in snapshot.records}
    repairs = find_repairs(store, pinned)
    records = {
        layer: tuple(repairs[layer].get(record, record) for record in found)
        for layer, found in pinned.items()
    }
    names = sorted({record.task for found in repairs.values() for record in found})
    if names:
        logger.warning(
            "snapshot %s: of %d of its tasks a newer generation of the same content is read, as a "
            "repair writes it: %s",
            *(snapshot.digest, len(names), name_some(names)),
        )
    return replace(snapshot, records={**snapshot.records, **records})
