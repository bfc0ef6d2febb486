"""A store on a file system that may only be read: what must write says so, the rest runs."""

import shutil
from contextlib import suppress

import pytest
from typer.testing import CliRunner

from jobs.__main__ import app
from pipeline.encode.prepare import prepare_encode
from pipeline.storage.interface import StorageError
from pipeline.store.commit import new_attempt
from pipeline.store.snapshot import read_snapshot
from pipeline.store.store import Store
from pipeline.upkeep.gc import list_orphans


@pytest.fixture
def read_only(small_disk, store_folder):
    """The tests' store with an attempt that lost, on a file system that is mounted read-only."""
    folder = small_disk(64 << 20) / "store"
    shutil.copytree(store_folder, folder, ignore=shutil.ignore_patterns("snapshots"))
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


CONFIG = """
head: {name: probe, blocks: [6], width: 4}
num_steps: 2
batch_size: 4
validate_every: 2
validation_pairs: 4
overlays: false
"""


@pytest.fixture
def train(tmp_path):
    """A function: train on a store into OUT, in this process."""
    (tmp_path / "train.yaml").write_text(CONFIG)

    def run(store, *options):
        config, out = str(tmp_path / "train.yaml"), str(tmp_path / "out")
        given = ["--config", config, "--out", out, "--workers", "0"]
        return CliRunner().invoke(app, ["train", "--store", str(store), *given, *options])

    return run


def test_a_run_keeps_its_snapshot_itself_where_resume_and_evaluate_find_it(
    read_only, train, tmp_path, caplog
):
    """Also where more was committed since: what was pinned is read."""
    result = train(read_only)
    assert result.exit_code == 0, result.output
    (kept,) = (tmp_path / "out" / "snapshots").iterdir()
    assert f"is kept as {kept}. ldznet gc and rm of that store do not see it" in caplog.text
    store = Store.open(str(read_only))
    assert read_snapshot(store, kept.stem, out=tmp_path / "out" / "checkpoints").digest == kept.stem
    caplog.clear()
    result = CliRunner().invoke(
        app, ["evaluate", "--store", str(read_only), "--checkpoint", str(tmp_path / "out" / "best")]
    )
    assert f"snapshot {kept.stem}" in result.stdout
    assert "scored on what is committed now" not in caplog.text
    (tmp_path / "train.yaml").write_text(CONFIG.replace("num_steps: 2", "num_steps: 4"))
    assert train(read_only, "--resume").exit_code == 0
    kept.unlink()
    (tmp_path / "train.yaml").write_text(CONFIG.replace("num_steps: 2", "num_steps: 6"))
    result = train(read_only, "--resume")
    assert result.exit_code == 2
    assert f"holds no snapshot {kept.stem!r}, and there is none in snapshots/ of" in result.output


def test_a_checkpoint_without_its_runs_snapshot_says_what_it_is_scored_on(
    read_only, train, tmp_path, caplog
):
    assert train(read_only).exit_code == 0
    shutil.copytree(tmp_path / "out" / "best", tmp_path / "alone" / "checkpoint")
    alone = str(tmp_path / "alone" / "checkpoint")
    evaluate = ["evaluate", "--store", str(read_only), "--checkpoint", alone]
    result = CliRunner().invoke(app, evaluate)
    assert result.exit_code == 0
    assert f"there is none in snapshots/ of {alone} or above it; the head was tr" in caplog.text


def test_a_snapshot_that_is_there_is_used_without_writing(
    small_disk, store_folder, train, tmp_path, caplog
):
    folder = small_disk(64 << 20) / "store"
    shutil.copytree(store_folder, folder)
    made = CliRunner().invoke(app, ["snapshot", str(folder)])
    small_disk(64 << 20, "ro")
    assert CliRunner().invoke(app, ["snapshot", str(folder)]).stdout == made.stdout
    assert train(folder).exit_code == 0
    assert not (tmp_path / "out" / "snapshots").exists()
    assert not caplog.records


def test_a_full_disk_is_read_like_any_other(small_disk, store_folder, train, tmp_path, caplog):
    folder = small_disk(64 << 20) / "store"
    shutil.copytree(store_folder, folder, ignore=shutil.ignore_patterns("snapshots", "inventory"))
    with (folder.parent / "filler").open("wb") as filler, suppress(OSError):
        while True:
            filler.write(bytes(1 << 20))
    assert train(folder).exit_code == 0
    assert len(list((tmp_path / "out" / "snapshots").iterdir())) == 1
    assert "No space left on device" in caplog.text


def test_snapshot_says_in_a_sentence_that_it_cannot_be_kept(read_only):
    result = CliRunner().invoke(app, ["snapshot", str(read_only)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "could not be written there: [Errno 30] Read-only file system" in result.stderr
