"""A store on a file system that may only be read: what must write says so, the rest runs."""

import shutil

import pytest
from typer.testing import CliRunner

from jobs.__main__ import app
from pipeline.encode.prepare import prepare_encode
from pipeline.storage.interface import StorageError
from pipeline.store.commit import new_attempt
from pipeline.store.store import Store
from pipeline.upkeep.gc import list_orphans


@pytest.fixture
def read_only(small_disk, store_folder):
    """The tests' store with an attempt that lost, on a file system that is mounted read-only."""
    folder = small_disk(64 << 20) / "store"
    shutil.copytree(store_folder, folder)
    store = Store.open(str(folder))
    layer = store.list_layers()[0].folder
    task = next(iter(store.newest_commits(layer)))
    store.storage.create(f"{layer}/data/{task}/{new_attempt(0)}/zarr.json", b"{}")
    small_disk(64 << 20, "ro")
    return folder


def test_gc_fails_with_the_reason_and_counts_nothing_as_removed(read_only):
    result = CliRunner().invoke(app, ["gc", str(read_only)])
    assert result.exit_code == 1
    assert "Read-only file system" in result.stderr
    assert "removed" not in result.stdout
    assert len(list(list_orphans(Store.open(str(read_only))))) == 1


def test_encode_with_nothing_to_do_writes_nothing(read_only, corpus_folder, spec):
    run = prepare_encode(spec, [str(corpus_folder / "*.tar")], str(read_only), batch=8)
    assert (run.num_done, run.items) == (3, ())


def test_encode_with_something_to_do_is_refused_in_a_sentence(
    read_only, corpus_folder, spec, tmp_path
):
    shutil.copy(next(corpus_folder.glob("*.tar")), tmp_path / "new.tar")
    with pytest.raises(StorageError, match="refused to write: no record could be created there"):
        prepare_encode(spec, [str(tmp_path / "new.tar")], str(read_only), batch=8)
