"""What a sweep is over: a snapshot and its content, kept in ``OUT/sweep.json``.

The content decides, and not the URL: a store may be moved, mounted elsewhere or copied.
"""

import hashlib
import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

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
    earlier: dict[str, Any] = {"store": url}
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
    if given:
        pinned = read_snapshot(store, given, out=out)
        pinned.require(layers, option="data.snapshot", reader="the sweep")
    elif "snapshot" not in earlier:
        pinned = create_snapshot(store, layers)
    else:
        pinned = _find(store, out, earlier["snapshot"], earlier["store"], layers)
    if missing := pinned.list_missing(layers):
        # Its own layers keep their commits, so that the trials over them keep their ids.
        more = create_snapshot(store, missing, write=False).records
        pinned = make_snapshot(store, {**pinned.records, **more})
    read = take_repairs(store, pinned, layers)
    same = given in (None, earlier.get("snapshot"))
    contents: dict[str, str] = earlier.get("contents", {}) if same else {}
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


def _find(store: Store, out: Path, digest: str, earlier: str, layers: Collection[str]) -> Snapshot:
    """Return OUT's snapshot; in a copy of the store without it, what is committed if it is that."""
    try:
        return read_snapshot(store, digest, out=out)
    except SpecError as error:
        now = create_snapshot(store, layers, write=False)
        if now.digest == digest:
            return make_snapshot(store, now.records)
        raise SpecError(
            f"{out}: holds a sweep over snapshot {digest} of {earlier}; {error}. What is committed "
            f"there is {now.digest}; give another --out"
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
