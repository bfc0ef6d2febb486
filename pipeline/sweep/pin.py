"""What a sweep is over: a snapshot and its content, kept in ``OUT/sweep.json``.

The content decides, and not the URL: a store may be moved, mounted elsewhere or copied.
"""

import hashlib
import json
import logging
from collections.abc import Collection
from pathlib import Path

from pipeline.base.whole_file import write_json
from pipeline.base.yaml import SpecError
from pipeline.store.records import read_rows
from pipeline.store.snapshot import (
    Snapshot,
    create_snapshot,
    keep_snapshot,
    make_snapshot,
    read_snapshot,
    take_repairs,
)
from pipeline.store.store import Store

logger = logging.getLogger(__name__)

PIN = "sweep.json"


def pin_snapshot(
    store: Store, out: Path, given: str | None, layers: Collection[str]
) -> tuple[Snapshot, Snapshot]:
    """Return the snapshot that all trials read, and the same with the repairs made since.

    It is the config's, that of OUT, or a new one.

    Raises:
        SpecError: the store has not the content of OUT's sweep, or not the snapshot.
    """
    path, url = out / PIN, store.storage.url
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"store": url}
    pinned = _find(store, out, given or earlier.get("snapshot"), earlier["store"], layers)
    if given:
        pinned.require(layers, option="data.snapshot", reader="the sweep")
    elif missing := pinned.list_missing(layers):
        # Its own layers keep their commits, so that the trials over them keep their ids.
        more = create_snapshot(store, missing, write=False).records
        pinned = make_snapshot(store, {**pinned.records, **more})
    read = take_repairs(store, pinned, layers)
    contents: dict[str, str] = earlier.get("contents", {})
    moved = earlier["store"] != url
    for layer in sorted({*layers, *contents} if moved else layers):
        found = _digest_content(store, read, layer)
        wanted = contents.get(layer)
        if wanted not in (None, found) and (found or moved):  # readers tell of damage
            raise SpecError(
                f"{out}: holds a sweep over {earlier['store']}, whose {layer} has the content "
                f"{wanted}; in {url} it is {found or 'not to be read'}; give another --out"
            )
        contents |= {layer: found} if found else {}
    keep_snapshot(store, pinned, out)
    if moved:
        logger.warning("%s: its sweep over %s goes on over %s", out, earlier["store"], url)
    plain = {"store": url, "snapshot": pinned.digest, "contents": contents}
    write_json(path, plain)
    return pinned, read


def _find(
    store: Store, out: Path, digest: str | None, earlier: str, layers: Collection[str]
) -> Snapshot:
    """Return the snapshot of a digest, None: a new one."""
    try:
        return read_snapshot(store, digest, out=out) if digest else create_snapshot(store, layers)
    except SpecError as error:
        if earlier == store.storage.url:
            raise
        now = create_snapshot(store, layers, write=False)
        raise SpecError(
            f"{out}: holds a sweep over {earlier}, at snapshot {digest}; {error}. What is "
            f"committed there is {now.digest}; give another --out"
        ) from error


def _digest_content(store: Store, snapshot: Snapshot, layer: str) -> str | None:
    """Return a digest of a layer's sources and pairs; None where a record cannot be read."""
    digest, records = hashlib.sha256(), snapshot.records[layer]
    rows = read_rows(store, layer, records, ("pairs_sha256", "source_sha256"))
    if rows["pairs_sha256"].null_count:
        return None
    for record, pairs, source in zip(
        records, rows["pairs_sha256"], rows["source_sha256"], strict=True
    ):
        digest.update(f"{record.task}\0{pairs}\0{source}\n".encode())
    return digest.hexdigest()[:16]
