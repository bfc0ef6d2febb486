"""Which tars a layer's commits were read from, without reading every record again.

A record is a file of its own; listing 100,000 names takes a few requests, reading them 100,000.
So a run keeps the sources of what it saw under ``inventory/<digest>.parquet`` of the layer, and
the next one reads those few files and only the records that none of them covers. A file holds
facts of records, which never change: it is a cache, says nothing of what is committed, and may be
deleted at any time.
"""

import hashlib
import io
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import DamagedStoreError, RecordName, read_commit
from pipeline.store import Store

logger = logging.getLogger(__name__)

INVENTORY_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("generation", pa.int32()),
        ("url", pa.string()),
        ("head_sha256", pa.string()),
    ]
)
NUM_READERS = 32  # records read at once: latency, not bandwidth, is what they cost
MAX_FILES = 16  # more than these are joined into one


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a committed task came from: the tar's URL and the SHA-256 of its first 64 KiB."""

    url: str
    head_sha256: str


Origins = dict[tuple[str, int], Origin]  # (task, generation) -> origin


def read_origins(
    store: Store, layer: str, records: Mapping[str, RecordName]
) -> tuple[dict[str, Origin], dict[str, str]]:
    """Return task → origin of a latents layer's records, and task → error of unreadable ones.

    What no inventory covers is read from the records, and a new inventory written of it.
    """
    known, names = _read_inventories(store, layer)
    unknown = [r for r in records.values() if (r.task, r.generation) not in known]
    found, errors = _read_records(store, layer, unknown)
    fresh = {(record.task, record.generation): origin for record, origin in found}
    if len(names) > MAX_FILES:
        joined = _write_inventory(store, layer, known | fresh)
        for name in set(names) - {joined}:  # one of them may have held all of it already
            store.storage.remove_tree(f"{layer}/inventory/{name}")
    elif fresh:
        _write_inventory(store, layer, fresh)
    known |= fresh
    keys = ((task, (record.task, record.generation)) for task, record in records.items())
    return {task: known[key] for task, key in keys if key in known}, errors


def _read_records(
    store: Store, layer: str, records: Iterable[RecordName]
) -> tuple[list[tuple[RecordName, Origin]], dict[str, str]]:
    def read(record: RecordName) -> tuple[RecordName, Origin | str]:
        try:
            source = read_commit(store.storage, layer, record).source
        except DamagedStoreError as error:
            return record, str(error)
        if source is None:
            return record, f"{layer}: the record of {record.task} names no source"
        return record, Origin(source.url, source.head_sha256)

    found: list[tuple[RecordName, Origin]] = []
    errors: dict[str, str] = {}
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for record, answer in pool.map(read, records):
            if isinstance(answer, str):
                errors[record.task] = answer
            else:
                found.append((record, answer))
    return found, errors


def _read_inventories(store: Store, layer: str) -> tuple[Origins, list[str]]:
    """Return what the layer's inventory files hold, and their names."""
    known: Origins = {}
    names = [n for n in store.storage.list_names(f"{layer}/inventory") if n.endswith(".parquet")]
    for name in names:
        path = f"{layer}/inventory/{name}"
        try:
            data = store.storage.read(path)
        except FileNotFoundError:
            continue  # joined with others by another run meanwhile
        if hashlib.sha256(data).hexdigest()[:16] != name.removesuffix(".parquet"):
            logger.warning("%s: is damaged; removed, for it is a cache", path)
            store.storage.remove_tree(path)  # or the same content could not be written anew
            continue
        table = pq.read_table(io.BytesIO(data), schema=INVENTORY_SCHEMA).to_pydict()
        for task, generation, url, head in zip(*table.values(), strict=True):
            known[task, generation] = Origin(url, head)
    return known, names


def _write_inventory(store: Store, layer: str, origins: Origins) -> str:
    """Write origins and return the file's name."""
    rows = [
        {"task": task, "generation": generation, "url": o.url, "head_sha256": o.head_sha256}
        for (task, generation), o in sorted(origins.items())
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=INVENTORY_SCHEMA), buffer, compression="zstd")
    data = buffer.getvalue()
    name = f"{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    store.storage.create(f"{layer}/inventory/{name}", data)
    return name
