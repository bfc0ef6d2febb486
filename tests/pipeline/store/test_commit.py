"""Commit records: what publishes a task, what a reader refuses, and that nothing is deleted."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from pipeline.storage.interface import StorageError, UnsafePathError
from pipeline.storage.local import LocalStorage
from pipeline.storage.open import open_storage
from pipeline.store.array_writer import write_bytes
from pipeline.store.commit import (
    Accounting,
    Commit,
    DamagedStoreError,
    RecordName,
    list_records,
    new_attempt,
    read_commit,
    to_committed,
    verify_written,
    write_commit,
)

LAYER = "latents-0123456789abcdef"


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "store")


def make_commit(storage, *, task="a", generation=0):
    attempt = new_attempt(0)
    folder = f"{LAYER}/data/{task}/{attempt}"
    files = [write_bytes(storage, f"{folder}/{name}", name.encode()) for name in ("x", "b/y")]
    return Commit(
        layer=LAYER,
        task=task,
        generation=generation,
        attempt=attempt,
        rows={"pairs": 2, "views": 1, "prompts": 3},
        pairs_sha256="0" * 64,
        files=to_committed(LAYER, files),
        provenance={"device": "cpu"},
    )


def list_all(storage):
    return {
        str(path.relative_to(storage.root)): path.read_bytes()
        for path in storage.root.rglob("*")
        if path.is_file()
    }


def test_a_commit_is_read_back_as_written(storage):
    commit = make_commit(storage)
    assert write_commit(storage, commit) == "won"
    assert read_commit(storage, LAYER, RecordName("a", 0)) == commit
    assert commit.name == f"{LAYER}/commits/a.0000.json"
    assert commit.num_bytes == len("x") + len("b/y")
    assert [file.path for file in commit.files] == [
        f"data/a/{commit.attempt}/b/y",
        f"data/a/{commit.attempt}/x",
    ]


def test_the_first_of_two_attempts_wins(storage):
    first, second = make_commit(storage), make_commit(storage)
    assert write_commit(storage, first) == "won"
    assert write_commit(storage, second) == "lost"
    assert write_commit(storage, first) == "won"  # tried again after a lost answer
    assert read_commit(storage, LAYER, RecordName("a", 0)) == first


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_of_eight_commits_of_a_task_one_wins_each_round(request, tmp_path, kind):
    url = str(tmp_path / "store") if kind == "local" else request.getfixturevalue("s3_url")
    storages = [open_storage(url) for _ in range(8)]
    rounds = range(20)
    commits = {
        (racer, task): make_commit(storages[racer], task=f"task{task}")
        for task in rounds
        for racer in range(8)
    }
    start = Barrier(8 * len(rounds))  # all rounds at once

    def race(key):
        start.wait()
        return key, write_commit(storages[key[0]], commits[key])

    with ThreadPoolExecutor(8 * len(rounds)) as pool:
        told = dict(pool.map(race, commits))
    for task in rounds:
        won = [racer for racer in range(8) if told[racer, task] == "won"]
        assert len(won) == 1, f"task {task}: {won}"
        record = RecordName(f"task{task}", 0)
        assert read_commit(storages[0], LAYER, record) == commits[won[0], task]


def test_the_newest_generation_is_listed(storage):
    assert list_records(storage, LAYER) == {}
    for task, generation in (("a", 0), ("a", 10), ("a", 2), ("b.tar", 0)):
        write_commit(storage, make_commit(storage, task=task, generation=generation))
    assert list_records(storage, LAYER) == {
        "a": RecordName("a", 10),
        "b.tar": RecordName("b.tar", 0),
    }


@pytest.mark.parametrize(
    "name",
    [
        ".a.0001.json.0123456789abcdef",
        ".a.0001.json",
        "a.001.json",
        "a.00001.json",
        "a.0001.json\n",
        "a.0001.json.bak",
        "a.٠٠٠١.json",
        "...0001.json",
        "a b.0001.json",
        "README",
    ],
)
def test_other_names_beside_the_records_are_not_records(storage, name):
    storage.create(f"{LAYER}/commits/a.0000.json", b"")
    (storage.root / LAYER / "commits" / name).write_bytes(b"{}")
    assert list_records(storage, LAYER) == {"a": RecordName("a", 0)}


class LosesAnswer(LocalStorage):
    """Creates the record, and then the answer is lost."""

    def create(self, path, data):
        super().create(path, data)
        raise OSError("connection reset")


class Refuses(LocalStorage):
    """Creates nothing."""

    def create(self, path, data):
        raise OSError("503 slow down")


def test_after_an_error_our_own_record_is_a_win(storage):
    commit = make_commit(storage)
    assert write_commit(LosesAnswer(storage.root), commit) == "won"


def test_after_an_error_anothers_record_is_a_loss(storage):
    write_commit(storage, make_commit(storage))
    commit = make_commit(storage)
    assert write_commit(LosesAnswer(storage.root), commit) == "lost"
    assert write_commit(Refuses(storage.root), commit) == "lost"


def test_after_an_error_no_record_is_raised_for_another_try(storage):
    commit = make_commit(storage)
    with pytest.raises(StorageError, match=r"a\.0000\.json: could not be committed: 503 slow"):
        write_commit(Refuses(storage.root), commit)
    assert write_commit(storage, commit) == "won"


@pytest.mark.parametrize("of", [LocalStorage, LosesAnswer, Refuses])
def test_an_unreadable_record_is_an_error_that_deletes_nothing(storage, of):
    commit = make_commit(storage)
    storage.create(commit.name, b'{"half": ')
    before = list_all(storage)
    with pytest.raises(DamagedStoreError, match=r"(?s)cannot be read .* the task's data is kept"):
        write_commit(of(storage.root), commit)
    assert list_all(storage) == before


def alter(storage, commit, change):
    """Commit, and then let ``change`` edit the record's JSON in place."""
    write_commit(storage, commit)
    path = storage.local_path(commit.name)
    plain = json.loads(path.read_bytes())
    del plain["record_sha256"]  # what is refused is refused for itself
    change(plain)
    path.write_text(json.dumps(plain))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("files"), "cannot be read"),
        (lambda c: c.update(more=1), "cannot be read"),
        (lambda c: c.update(schema_version=0), "cannot be read"),
        (lambda c: c.update(rows={"pairs": 1}), "rows must count ignores, masks, pairs"),
        (lambda c: c["rows"].update(pairs=-1), "rows must count"),
        (lambda c: c.update(attempt="../../x"), "expected a relative path inside the store"),
        (lambda c: c["files"][0].update(path="/etc/passwd"), "expected a relative path inside"),
        (lambda c: c["files"][0].update(path="../../x"), "expected a relative path inside"),
        (lambda c: c["files"][0].update(path="data/b/c/x"), "lists a file outside"),
        (lambda c: c["files"][0].update(path=f"data/a/{c['attempt']}0/x"), "lists a file outside"),
        (lambda c: c["files"][0].update(path=f"data/a/{c['attempt']}"), "lists a file outside"),
        (lambda c: c["files"][0].update(sha256="short"), "cannot be read"),
        (lambda c: c["files"][0].update(num_bytes=-1), "cannot be read"),
        (lambda c: c.update(task="b"), "the record is that of"),
        (lambda c: c.update(generation=1), "the record is that of"),
        (lambda c: c.update(layer="latents-ffffffffffffffff"), "the record is that of"),
    ],
)
def test_an_altered_record_is_refused_and_nothing_is_deleted(storage, change, message):
    alter(storage, make_commit(storage), change)
    before = list_all(storage)
    with pytest.raises(DamagedStoreError, match=rf"(?s)a\.0000\.json: .*{message}"):
        read_commit(storage, LAYER, RecordName("a", 0))
    assert list_all(storage) == before


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[]", b"[" * 100_000, b"null"])
def test_a_record_that_is_no_json_object_is_refused(storage, data):
    storage.create(f"{LAYER}/commits/a.0000.json", data)
    with pytest.raises(DamagedStoreError, match=r"a\.0000\.json: the commit record cannot be read"):
        read_commit(storage, LAYER, RecordName("a", 0))


def test_a_missing_record_is_damage_too(storage):
    with pytest.raises(DamagedStoreError, match="cannot be read"):
        read_commit(storage, LAYER, RecordName("a", 0))


@pytest.mark.parametrize("change", ["flip", "cut", "grow"])
def test_what_is_altered_after_it_was_written_is_not_verified(storage, change):
    written = write_bytes(storage, f"{LAYER}/data/a/b/x", b"content")
    verify_written(storage, [written])
    altered = {"flip": b"contenu", "cut": b"conten", "grow": b"contents"}[change]
    storage.local_path(written.path).write_bytes(altered)
    sha256 = hashlib.sha256(altered).hexdigest()[:12]
    with pytest.raises(DamagedStoreError, match=f"data/a/b/x: read back .*{sha256}.*nothing was"):
        verify_written(storage, [written])


def test_what_is_gone_after_it_was_written_is_not_verified(storage):
    written = write_bytes(storage, "x", b"content")
    storage.local_path("x").unlink()
    with pytest.raises(FileNotFoundError):
        verify_written(storage, [written])


def test_a_commit_that_leaves_the_store_cannot_be_made(storage):
    with pytest.raises(ValueError, match="inside the store"):
        Commit.model_validate(make_commit(storage).model_dump() | {"attempt": "../x"})
    with pytest.raises(UnsafePathError):
        storage.create("../x", b"")


def test_accounting_balances():
    counts = {"stored_samples": 3, "rejected_samples": 2, "rejected_members": 9}
    assert Accounting(samples=5, **counts).balanced
    assert not Accounting(samples=6, **counts).balanced


def test_a_record_whose_any_character_changed_is_not_read(storage):
    commit = make_commit(storage)
    write_commit(storage, commit)
    path = storage.local_path(commit.name)
    data = path.read_bytes()
    record = RecordName(commit.task, commit.generation)
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(DamagedStoreError):
            read_commit(storage, LAYER, record)
    path.write_bytes(data)
    assert read_commit(storage, LAYER, record) == commit
