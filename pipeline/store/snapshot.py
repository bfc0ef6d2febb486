"""Snapshots: frozen lists of the commits that a run reads, named by their content."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.base.yaml import SpecError
from pipeline.spec.layer import SCHEMA_VERSION
from pipeline.store.commit import DamagedStoreError, RecordName, list_records
from pipeline.store.store import Store, _check_version


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A frozen list of commits: layer folder → the records that a run reads."""

    digest: str
    records: Mapping[str, tuple[RecordName, ...]]

    def list_missing(self, layers: Iterable[str]) -> list[str]:
        """The folders of ``layers`` that it does not hold, sorted."""
        return sorted(set(layers) - set(self.records))

    def require(self, layers: Iterable[str], *, option: str, reader: str, other: str = "") -> None:
        """Check that it holds what a run reads.

        Args:
            layers: the folders that are read.
            option: where the snapshot was asked for, as ``--snapshot``.
            reader: what reads them, as ``the sweep``.
            other: another way out than a snapshot of every layer.

        Raises:
            SpecError: a layer is not in it.
        """
        missing = self.list_missing(layers)
        if missing:
            raise SpecError(
                f"{option}: {self.digest} holds {', '.join(sorted(self.records))}, without "
                f"{', '.join(missing)}, which {reader} reads; take a snapshot of every layer{other}"
            )


def create_snapshot(store: Store, layers: Iterable[str]) -> Snapshot:
    """Freeze the newest commits of some layers and write ``snapshots/<digest>.json``."""
    return write_snapshot(store, _list_newest(store, layers))


def take_snapshot(store: Store, layers: Iterable[str]) -> Snapshot:
    """Freeze the newest commits of some layers without writing anything."""
    records = _list_newest(store, layers)
    return Snapshot(_digest_snapshot(_format_snapshot(records)), records)


def write_snapshot(store: Store, records: Mapping[str, tuple[RecordName, ...]]) -> Snapshot:
    """Write ``snapshots/<digest>.json`` of some layers' commits, each sorted by task."""
    data = _format_snapshot(records)
    digest = _digest_snapshot(data)
    store.storage.create(f"snapshots/{digest}.json", data)
    return Snapshot(digest, records)


def _list_newest(store: Store, layers: Iterable[str]) -> dict[str, tuple[RecordName, ...]]:
    # Latents first: a task commits them before its features, so that one committed meanwhile is
    # never seen as latents alone.
    return {
        layer: tuple(record for _, record in sorted(list_records(store.storage, layer).items()))
        for layer in sorted(layers, reverse=True)
    }


def _format_snapshot(records: Mapping[str, tuple[RecordName, ...]]) -> bytes:
    plain = {layer: [[r.task, r.generation] for r in listed] for layer, listed in records.items()}
    return json.dumps({"schema_version": SCHEMA_VERSION, "records": plain}, sort_keys=True).encode()


def _digest_snapshot(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def read_snapshot(store: Store, digest: str) -> Snapshot:
    """Read a snapshot back.

    Raises:
        SpecError: no such snapshot, or one of a later version of ldznet.
        DamagedStoreError: its content does not have the digest it is named by.
    """
    path = f"snapshots/{digest}.json"
    try:
        data = store.storage.read(path)
    except FileNotFoundError as error:
        raise SpecError(f"{store.storage.url}: holds no snapshot {digest!r}") from error
    if _digest_snapshot(data) != digest:
        raise DamagedStoreError(f"{path}: its content has another digest than its name")
    plain = json.loads(data)
    _check_version(f"{store.storage.url}/{path}", plain["schema_version"])
    records = {
        layer: tuple(RecordName(task, generation) for task, generation in listed)
        for layer, listed in plain["records"].items()
    }
    return Snapshot(digest, records)
