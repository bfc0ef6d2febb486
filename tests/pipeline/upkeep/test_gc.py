"""Orphans: what no record can ever name goes, and nothing else."""

import os
import shutil
import time

import pytest
from typer.testing import CliRunner

import pipeline.upkeep.gc
from jobs.__main__ import app
from pipeline.storage import aws
from pipeline.storage.s3_upload import PART_BYTES
from pipeline.store.commit import DamagedStoreError, attempt_generation, new_attempt, read_commit
from pipeline.store.store import Store
from pipeline.upkeep.gc import Orphan, list_orphans, list_uploads, remove_orphans
from pipeline.upkeep.verify import verify_store
from tests.support.s3_server import put


@pytest.fixture
def local_store(copied_store):
    return Store.open(str(copied_store))


@pytest.fixture
def s3_store(store_folder, s3_url):
    """The tests' store on the S3 server."""
    store = Store.open(s3_url)
    for path in store_folder.rglob("*"):
        if path.is_file():
            put(store.storage, path.relative_to(store_folder).as_posix(), path.read_bytes())
    return store


@pytest.fixture(params=["local", "s3"])
def store(request):
    return request.getfixturevalue(f"{request.param}_store")


@pytest.fixture
def commit(store):
    """The first task's features commit."""
    return next(iter(store.newest_commits(store.list_layers()[1].folder).values()))


def write_attempt(store, commit, generation):
    """What a killed writer leaves: some files of an attempt. Returns its folder."""
    folder = f"{commit.layer}/data/{commit.task}/{new_attempt(generation)}"
    for name in ("arrays.zarr/block06/c/0/0/0/0/0", "arrays.zarr/zarr.json"):
        with store.storage.open_write(f"{folder}/{name}") as file:
            file.write(b"12345")
    return folder


def list_all(store):
    return {path for path, _ in store.storage.list_files()}


def remove_all(store):
    return list(remove_orphans(store, list_orphans(store)))


def test_a_store_without_faults_has_none(store):
    before = list_all(store)
    assert remove_all(store) == []
    assert list_all(store) == before


def test_attempts_that_lost_go_and_the_winner_stays(store, commit):
    before = list_all(store)
    folders = {write_attempt(store, commit, 0) for _ in range(2)}
    assert set(list_orphans(store)) == {Orphan(folder, 10) for folder in folders}
    assert list_all(store) > before  # listing removes nothing
    assert {orphan.path for orphan in remove_all(store)} == folders
    assert list_all(store) == before
    # SeaweedFS shows an emptied folder for a while yet.
    assert [orphan for orphan in remove_all(store) if orphan.num_bytes] == []


def test_attempts_of_a_generation_without_a_record_stay(store, commit):
    """Its writer may be at work: a first encode, or a repair."""
    write_attempt(store, commit, 1)
    write_attempt(store, commit.model_copy(update={"task": "not-yet-1234abcd"}), 0)
    write_attempt(store, commit.model_copy(update={"task": "not-yet-1234abcd"}), 0)
    before = list_all(store)
    assert remove_all(store) == []
    assert list_all(store) == before


def test_an_attempt_goes_with_the_record_of_its_own_generation(store, commit):
    """A repair has been committed: its losers go, those of generation 2 and the old one stay."""
    losers = [write_attempt(store, commit, generation) for generation in (0, 1)]
    kept = write_attempt(store, commit, 2)
    newer = commit.model_copy(update={"generation": 1, "attempt": new_attempt(1), "files": ()})
    assert store.storage.create(newer.name, newer.model_dump_json().encode())
    before = list_all(store)
    assert [orphan.path for orphan in remove_all(store)] == sorted(losers)
    after = list_all(store)
    assert before - after == {path for path in before if path.startswith(tuple(losers))}
    assert any(path.startswith(kept) for path in after)
    assert any(path.startswith(commit.data_folder) for path in after)  # snapshots may pin it


@pytest.mark.parametrize("name", ["0123456789abcdef", "0000-xyz", "0000-0123", "notes", "00000-"])
def test_names_that_tell_no_generation_stay(local_store, name):
    commit = next(iter(local_store.newest_commits(local_store.list_layers()[0].folder).values()))
    assert attempt_generation(name) is None
    with local_store.storage.open_write(f"{commit.layer}/data/{commit.task}/{name}/x") as file:
        file.write(b"1")
    assert remove_all(local_store) == []


def test_on_the_word_of_a_damaged_record_nothing_goes_and_others_go_on(
    local_store, copied_store, caplog
):
    layer = local_store.list_layers()[1].folder
    broken, sound, _ = local_store.newest_commits(layer).values()
    kept = write_attempt(local_store, broken, 0)
    orphan = write_attempt(local_store, sound, 0)
    (copied_store / broken.name).write_text("{")
    assert [found.path for found in remove_all(local_store)] == [orphan]
    assert (copied_store / kept).exists()
    assert (copied_store / broken.data_folder).exists()
    assert f"{broken.name}: the commit record cannot be read" in caplog.text
    assert "nothing of this task and generation is removed" in caplog.text


def test_a_damaged_spec_or_a_failing_storage_ends_it(local_store, copied_store, monkeypatch):
    layer = local_store.list_layers()[1].folder
    commit = next(iter(local_store.newest_commits(layer).values()))
    write_attempt(local_store, commit, 0)
    before = list_all(local_store)

    def denied(storage, layer, record):
        raise PermissionError("HTTP 403")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.upkeep.gc, "read_commit", denied)
        with pytest.raises(PermissionError, match="HTTP 403"):
            remove_all(local_store)
    (copied_store / layer / "spec.json").write_text("{")
    with pytest.raises(DamagedStoreError, match=r"spec\.json"):
        remove_all(local_store)
    assert list_all(local_store) == before


def test_a_record_that_comes_between_the_listing_and_the_look_is_heeded(
    local_store, copied_store, monkeypatch
):
    """Its attempt is the winner by then; the other one is not."""
    layer = local_store.list_layers()[1].folder
    commit = next(iter(local_store.newest_commits(layer).values()))
    other = write_attempt(local_store, commit, 0)
    record = copied_store / commit.name
    data = record.read_bytes()
    record.unlink()

    def read_late(storage, layer, name):
        if name.task == commit.task:
            record.write_bytes(data)
        return read_commit(storage, layer, name)

    monkeypatch.setattr(pipeline.upkeep.gc, "read_commit", read_late)
    assert [orphan.path for orphan in remove_all(local_store)] == [other]


def test_temporaries_go_once_their_name_is_taken(local_store, copied_store):
    layer = local_store.list_layers()[0].folder
    commit = next(iter(local_store.newest_commits(layer).values()))
    commits = copied_store / layer / "commits"
    taken = commits / f".{commit.task}.0000.json.{'0a' * 8}"
    kept = [
        commits / f".{commit.task}.0001.json.{'0a' * 8}",  # its writer may be at work
        commits / f".{commit.task}.0000.json.swp",
        copied_store / layer / f".spec.json.{'0a' * 8}",  # its writer would fail
    ]
    for path in (taken, *kept):
        path.write_bytes(b"{}")
    assert remove_all(local_store) == [Orphan(str(taken.relative_to(copied_store)), 2)]
    assert not taken.exists()
    assert all(path.exists() for path in kept)


def test_a_symbolic_link_out_of_the_store_is_not_followed(local_store, copied_store, tmp_path):
    layer = local_store.list_layers()[0].folder
    commit = next(iter(local_store.newest_commits(layer).values()))
    outside = tmp_path / "outside"
    shutil.copytree(copied_store / commit.data_folder, outside)
    link = copied_store / layer / "data" / commit.task / new_attempt(0)
    link.symlink_to(outside)
    remove_all(local_store)
    assert not link.is_symlink()
    assert (outside / "index.parquet").exists()


def test_the_command_lists_and_then_removes(local_store, copied_store):
    commit = next(iter(local_store.newest_commits(local_store.list_layers()[0].folder).values()))
    folder = write_attempt(local_store, commit, 0)
    dry = CliRunner().invoke(app, ["gc", str(copied_store), "--dry-run"])
    assert dry.exit_code == 0
    assert dry.stdout.splitlines() == [f"would remove {folder}", "1 orphan to remove, 0.0 MB"]
    assert (copied_store / folder).exists()
    done = CliRunner().invoke(app, ["gc", str(copied_store)])
    assert done.stdout.splitlines() == [f"removed {folder}", "1 orphan removed, 0.0 MB"]
    assert not (copied_store / folder).exists()
    assert CliRunner().invoke(app, ["gc", str(copied_store)]).stdout.startswith("0 orphans removed")


@pytest.fixture
def uploads(s3_store):
    """What killed writers left: by the record's state, uploads that never ended."""
    layer = s3_store.list_layers()[1].folder
    commit = next(iter(s3_store.newest_commits(layer).values()))
    attempts = {
        "lost": f"{commit.task}/{new_attempt(0)}",
        "won": f"{commit.task}/{commit.attempt}",
        "no record": f"{commit.task}/{new_attempt(1)}",
        "no task": f"not-yet-1234abcd/{new_attempt(0)}",
        "no attempt": "notes",
    }
    begun = {}
    for state, attempt in attempts.items():
        path = f"{layer}/data/{attempt}/arrays.zarr/image/c/0/0/0/0"
        begun[state] = path, s3_store.storage.open_write(path)
        begun[state][1].write(bytes(2 * PART_BYTES))
    while any(upload.num_bytes < 2 * PART_BYTES for upload, _ in list_uploads(s3_store)):
        time.sleep(0.05)  # obstore sends a part on after ``write`` has returned
    yield {state: path for state, (path, _) in begun.items()}
    for _, file in begun.values():
        file.abandon()


def test_uploads_of_a_task_with_its_record_are_useless(s3_store, uploads):
    before = list_all(s3_store)
    found = {upload.path: useless for upload, useless in list_uploads(s3_store)}
    expected = {path: state in ("lost", "won") for state, path in uploads.items()}
    assert found == expected
    assert list_all(s3_store) == before  # which shows none of them


def test_the_command_aborts_useless_uploads_and_tells_of_the_others(s3_store, uploads):
    url = s3_store.storage.url
    dry = CliRunner().invoke(app, ["gc", url, "--dry-run"]).stdout.splitlines()
    assert dry[:2] == ["0 orphans to remove, 0.0 MB", "2 uploads to abort, 33.6 MB"]
    done = CliRunner().invoke(app, ["gc", url]).stdout.splitlines()
    assert done[:2] == ["0 orphans removed, 0.0 MB", "2 uploads aborted, 33.6 MB"]
    assert done[2].startswith("3 uploads stay, 50.3 MB: their tasks have no commit yet")
    again = CliRunner().invoke(app, ["gc", url]).stdout.splitlines()
    assert again[0] == "0 orphans removed, 0.0 MB"
    assert again[1:] == done[2:]


def test_an_upload_that_ended_meanwhile_is_no_error(s3_store, uploads):
    found = [upload for upload, _ in list_uploads(s3_store)]
    for _ in range(2):
        for upload in found:
            upload.abort()
    assert list(list_uploads(s3_store)) == []


def test_uploads_that_may_not_be_listed_are_said_so_and_the_rest_is_done(s3_store, proxy, caplog):
    proxy.add("denied", "GET", r"\?uploads")
    result = CliRunner().invoke(app, ["gc", s3_store.storage.url])
    assert (result.exit_code, result.stdout) == (0, "0 orphans removed, 0.0 MB\n")
    assert "HTTP 403 AccessDenied. The policy must allow s3:ListBucketMultipartUp" in caplog.text


def test_without_botocore_the_extra_is_named(s3_store, monkeypatch, caplog):
    monkeypatch.setattr(aws, "Session", None)
    assert CliRunner().invoke(app, ["gc", s3_store.storage.url]).exit_code == 0
    assert "install ldznet[s3]" in caplog.text


def test_a_mistyped_store_is_said_so(tmp_path):
    result = CliRunner().invoke(app, ["gc", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "expected a store, found no layer" in result.stderr


@pytest.mark.parametrize("shift_s", [-86_400, 86_400])
def test_no_clock_takes_part(local_store, shift_s):
    """Fault 21: files a day older or newer than they are change neither gc nor verify."""
    commit = next(iter(local_store.newest_commits(local_store.list_layers()[1].folder).values()))
    orphan = write_attempt(local_store, commit, commit.generation)
    live = write_attempt(local_store, commit, commit.generation + 1)
    for path in local_store.storage.root.rglob("*"):
        then = path.stat().st_mtime + shift_s
        os.utime(path, (then, then))
    assert [removed.path for removed in remove_all(local_store)] == [orphan]
    assert any(local_store.storage.list_files(live))
    assert [check.damage for check in verify_store(local_store)] == [[]] * 6
