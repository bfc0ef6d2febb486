"""Where a snapshot is read from."""

import shutil

import pytest

from pipeline.store.snapshot import create_snapshot, read_snapshot
from pipeline.store.store import Store


def test_where_the_store_gives_no_snapshot_it_is_that_of_the_run(copied_store, tmp_path):
    """Who may not write a store's snapshots perhaps may not read them either."""
    store = Store.open(str(copied_store))
    made = create_snapshot(store, [layer.folder for layer in store.list_layers()])
    kept = tmp_path / "run" / "snapshots"
    kept.mkdir(parents=True)
    shutil.move(copied_store / "snapshots" / f"{made.digest}.json", kept)
    shutil.rmtree(copied_store / "snapshots")
    (copied_store / "snapshots").write_text("in the way")
    read = read_snapshot(store, made.digest, out=tmp_path / "run" / "checkpoints")
    assert (read.digest, read.records) == (made.digest, made.records)
    with pytest.raises(NotADirectoryError):
        read_snapshot(store, made.digest, out=tmp_path / "other")
