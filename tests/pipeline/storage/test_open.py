"""Every kind of storage does the same: POSIX, and S3 on a real server."""

import errno
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest

from pipeline.storage.interface import StorageError, UnsafePathError, check_path
from pipeline.storage.local import LocalStorage
from pipeline.storage.open import check_create, open_storage

MIB = 2**20
NUM_RACERS, NUM_ROUNDS = 8, 20
RACER = f"""
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from pipeline.storage.open import open_storage
storage = open_storage(sys.argv[1])
def race(number):
    time.sleep(max(0, start - time.monotonic()))
    begun = time.monotonic()
    won = storage.create(f"commits/task.{{number:04d}}.json", sys.argv[2].encode() * 1000)
    return won, begun, time.monotonic()
print("ready", flush=True)
start = float(sys.stdin.readline())
with ThreadPoolExecutor({NUM_ROUNDS}) as pool:  # all rounds at once: SeaweedFS's lock waits by 1 s
    print(json.dumps(list(pool.map(race, range({NUM_ROUNDS})))), flush=True)
"""


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path):
    if request.param == "local":
        return open_storage(str(tmp_path / "store"))
    return open_storage(request.getfixturevalue("s3_url"))


@pytest.mark.parametrize("path", ["a", "a/b", "a/b.c/d e", "a/...", ".a/b", "a//b", "ä/b"])
def test_plain_relative_paths_pass(path):
    assert check_path(path) == path


@pytest.mark.parametrize(
    "path", ["", ".", "/", "/a", "//a", "..", "a/..", "../a", "a/../b", "a\\b", "..\\a", "a\0b"]
)
def test_paths_that_may_leave_the_store_are_refused(storage, path):
    with pytest.raises(UnsafePathError, match="expected a relative path inside the store"):
        check_path(path)
    looks = (storage.read, storage.size, storage.digest, storage.find_time, storage.list_times)
    for use in (*looks, storage.open_write, storage.exists):
        with pytest.raises(UnsafePathError, match="inside the store"):
            use(path)
    with pytest.raises(UnsafePathError, match="inside the store"):
        storage.create(path, b"")
    with pytest.raises(UnsafePathError, match="inside the store"):
        storage.remove_tree(path)


@pytest.mark.parametrize("path", ["a", "a/b.c/d e", ".a/b", "ä/b", "a/%20b", "a/b+c", "a/b#c?d=e"])
def test_any_plain_name_is_kept_as_it_is(storage, path):
    assert storage.create(path, b"12")
    assert storage.read(path) == b"12"
    assert list(storage.list_files()) == [(path, 2)]
    assert list(storage.list_names()) == [path.split("/")[0]]


def test_a_file_is_written_once_with_its_digest(storage):
    with storage.open_write("a/b/file") as file:
        file.write(b"one")
        file.write(memoryview(bytearray(b"two")))
    file.close()
    file.abandon()
    assert storage.read("a/b/file") == b"onetwo"
    assert storage.digest("a/b/file") == (6, file.sha256)
    assert (file.num_bytes, storage.size("a/b/file")) == (6, 6)
    storage.sync_folders("a/b")


@pytest.mark.parametrize("num_bytes", [0, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 20 * MIB])
def test_files_about_the_size_of_a_part(storage, num_bytes):
    data = os.urandom(num_bytes)
    with storage.open_write("file") as file:
        for start in range(0, num_bytes, 3 * MIB):
            file.write(data[start : start + 3 * MIB])
    assert file.num_bytes == num_bytes
    assert storage.digest("file") == (num_bytes, file.sha256)
    assert storage.read("file") == data


def test_what_is_written_is_copied_at_once(storage):
    buffer = bytearray(b"a" * 9 * MIB)
    with storage.open_write("file") as file:
        file.write(memoryview(buffer))
        buffer[:] = b"b" * len(buffer)
    assert storage.digest("file") == (len(buffer), file.sha256)


def test_ranges_end_with_the_file(storage):
    with storage.open_write("file") as file:
        file.write(bytes(range(10)))
    assert storage.read_range("file", 2, 3) == bytes([2, 3, 4])
    assert storage.read_range("file", 8, 5) == bytes([8, 9])
    assert storage.read_range("file", 10, 5) == b""
    assert storage.read_range("file", 20, 5) == b""
    assert storage.read_range("file", 2, 0) == b""
    assert storage.read_tail("file", 4) == (bytes([6, 7, 8, 9]), 10)
    assert storage.read_tail("file", 10) == storage.read_tail("file", 11) == (bytes(range(10)), 10)
    storage.create("empty", b"")
    assert storage.read_tail("empty", 4) == (b"", 0)


def test_what_is_missing_is_not_found(storage):
    for use in (storage.read, storage.size, storage.digest):
        with pytest.raises(FileNotFoundError, match="none"):
            use("none")
    with pytest.raises(FileNotFoundError, match="none"):
        storage.read_range("none", 0, 1)
    with pytest.raises(FileNotFoundError, match="none"):
        storage.read_tail("none", 1)
    assert not storage.exists("none")
    assert list(storage.list_names("none")) == []
    assert list(storage.list_files("none")) == []
    storage.remove_tree("none")


def test_names_and_files_of_a_folder(storage):
    assert list(storage.list_names()) == []
    assert list(storage.list_files()) == []
    for name, data in (("a/x", b"1"), ("a/y/z", b"22"), ("ab", b"333")):
        storage.create(name, data)
    assert sorted(storage.list_names()) == ["a", "ab"]
    assert sorted(storage.list_names("a")) == ["x", "y"]
    assert sorted(storage.list_files()) == [("a/x", 1), ("a/y/z", 2), ("ab", 3)]
    assert sorted(storage.list_files("a")) == [("a/x", 1), ("a/y/z", 2)]
    assert [storage.exists(name) for name in ("a", "a/y", "a/y/z", "a/z", "aa")] == [
        False, False, True, False, False,
    ]  # fmt: skip


def test_a_files_time_is_when_it_was_written(storage):
    storage.create("layer/commits/a.json", b"{}")
    written_s = storage.find_time("layer/commits/a.json")
    assert written_s == pytest.approx(time.time(), abs=600)
    assert storage.list_times("layer/commits") in ({}, {"a.json": written_s})
    assert storage.find_time("layer/commits/none.json") is None
    assert storage.list_times("none") == {}


def test_a_listing_of_objects_tells_their_times(s3_url):
    storage = open_storage(s3_url)
    storage.create("layer/commits/a.json", b"{}")
    times = {"a.json": storage.find_time("layer/commits/a.json")}
    assert storage.list_times("layer/commits") == times


def test_a_tree_is_removed_and_nothing_beside_it(storage):
    for name in ("a/x", "a/y/z", "ab/x"):
        storage.create(name, b"")
    storage.create("a.b", b"")
    storage.remove_tree("a")
    assert sorted(storage.list_files()) == [("a.b", 0), ("ab/x", 0)]
    assert not storage.exists("a/y")
    storage.remove_tree("ab/x")
    assert list(storage.list_files()) == [("a.b", 0)]


def test_create_is_for_the_first_alone(storage):
    assert storage.create("commits/r", b"first")
    assert not storage.create("commits/r", b"second")
    assert storage.read("commits/r") == b"first"
    assert list(storage.list_names("commits")) == ["r"]  # no temporary file stays


@pytest.mark.thorough
def test_of_eight_racing_processes_one_wins_each_round(storage):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, storage.url, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(NUM_RACERS)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    start = time.monotonic() + 0.5
    for racer in racers:
        racer.stdin.write(f"{start}\n")
        racer.stdin.flush()
    told = [json.loads(racer.communicate(timeout=60)[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * NUM_RACERS
    num_raced = 0
    for number in range(NUM_ROUNDS):
        tries = [told[racer][number] for racer in range(NUM_RACERS)]
        won = [racer for racer, (success, _, _) in enumerate(tries) if success]
        assert len(won) == 1, f"round {number}: {won}"
        record = storage.read(f"commits/task.{number:04d}.json")
        assert record == str(won[0]).encode() * 1000
        spans = sorted((begun, ended) for _, begun, ended in tries)
        num_raced += any(later < ended for (_, ended), (later, _) in pairwise(spans))
    assert len(list(storage.list_names("commits"))) == NUM_ROUNDS
    assert num_raced  # else no two were at one record at once


def test_an_error_inside_a_file_leaves_none_that_reads_whole(storage):
    file = storage.open_write("file")

    def write_half():
        with file:
            file.write(b"h" * 9 * MIB)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    with pytest.raises((OSError, ValueError), match=r"upload has ended|closed file"):
        file.write(b"more")


def test_a_storage_opens_elsewhere_by_its_url(storage):
    storage.create("a", b"1")
    assert open_storage(storage.url).read("a") == b"1"
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"1"


def test_the_probe_passes_and_leaves_no_file(storage):
    check_create(storage)
    assert list(storage.list_files()) == []


class Overwrites(LocalStorage):
    """A store where a record may be created twice, as where a server ignores the condition."""

    def create(self, path, data):
        target = self.local_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return True


class TellsNobody(LocalStorage):
    """Loses every answer, as a server that failed once and was asked again."""

    def create(self, path, data):
        super().create(path, data)
        return False


class KeepsAnother(LocalStorage):
    """Tells one racer that it won and keeps what another wrote."""

    def __init__(self, root):
        super().__init__(root)
        self._lock = threading.Lock()
        self._tries = 0

    def create(self, path, data):
        with self._lock:
            self._tries += 1
            Overwrites.create(self, path, data)
            return self._tries == 1


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Overwrites, "9 writers created one record and 9 were told"),
        (KeepsAnother, "9 writers created one record and 1 were told"),
    ],
)
def test_the_probe_refuses_storage_where_a_record_may_have_two_writers(tmp_path, kind, message):
    storage = kind(tmp_path / "store")
    with pytest.raises(StorageError, match=f"store: refused to write: {message}"):
        check_create(storage)
    assert list(storage.list_files()) == []


@pytest.fixture(params=["EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EMLINK"])
def no_links(request, monkeypatch):
    """A file system without hard links, such as exFAT, SMB shares and mounts of buckets."""
    number = getattr(errno, request.param)

    def refuse(source, target):
        raise OSError(number, os.strerror(number), source, None, target)

    monkeypatch.setattr(os, "link", refuse)
    return os.strerror(number)


def test_a_file_system_without_hard_links_is_refused_with_its_reason(tmp_path, no_links):
    storage = LocalStorage(tmp_path / "store")
    said = (
        rf"store: refused to write: .*makes no hard links \({no_links}\)\. A store needs a folder"
    )
    with pytest.raises(StorageError, match=said):
        check_create(storage)
    assert list(storage.list_files()) == []


def test_who_may_not_link_is_denied_and_not_told_of_file_systems(tmp_path, monkeypatch):
    def deny(source, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "link", deny)
    with pytest.raises(PermissionError, match="Permission denied"):
        check_create(LocalStorage(tmp_path / "store"))


def test_content_is_written_once_and_whole(storage):
    storage.write_content("snapshots/0a.json", b"content")
    storage.write_content("snapshots/0a.json", b"content")
    assert dict(storage.list_files()) == {"snapshots/0a.json": 7}
    assert storage.read("snapshots/0a.json") == b"content"


def test_the_probe_passes_where_the_winner_lost_its_answer(tmp_path):
    check_create(TellsNobody(tmp_path / "store"))


def test_paths_and_file_urls_open_the_same_store(tmp_path, monkeypatch):
    folder = tmp_path / "a b#1"
    assert open_storage(str(folder)).root == folder
    assert open_storage(folder.as_uri()).root == folder
    monkeypatch.chdir(tmp_path)
    assert open_storage("store").url == str(tmp_path / "store")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_storage("~/store").url == str(tmp_path / "store")


@pytest.mark.parametrize(
    "url", ["gs://key:secret@b/s", "az://b/s", "memory://s", "http://b/?secret"]
)
def test_other_schemes_are_refused_without_showing_the_url(url):
    scheme = url.split(":")[0]
    with pytest.raises(ValueError, match=f"s3://bucket/prefix, got .*scheme '{scheme}'") as error:
        open_storage(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["simplecache::s3://b/s", "simplecache::file:///s", "a::b", "pipe:cat secret"]
)
def test_chained_and_command_urls_are_refused(url):
    with pytest.raises(ValueError, match=r"expected a local path.* chained URLs are") as error:
        open_storage(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["", "file://", "file://host/store", "file:///store?x=1"])
def test_urls_that_would_lose_a_part_are_refused(url):
    with pytest.raises(ValueError, match=r"expected a path, file:///path or s3://bucket/prefix"):
        open_storage(url)


@pytest.mark.parametrize("below", ["", "/store"])
def test_a_path_that_leads_to_a_file_is_refused(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=rf"expected a folder or s3:// URL.*{file} is a file"):
        open_storage(f"{file}{below}")


@pytest.mark.parametrize("bucket", ["b", "B_secret", "secret-", "secret" * 11])
def test_a_name_that_no_bucket_has_is_told_by_its_rule(bucket):
    with pytest.raises(ValueError, match="expected a bucket of 3 to 63 lower-case") as error:
        open_storage(f"s3://{bucket}/store")
    plural = "s" * (len(bucket) > 1)
    assert str(error.value).endswith(f"got another name, of {len(bucket)} character{plural}")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:secret@bucket/store", "s3://bucket/store?secret=1", "s3://bucket/store#secret",
        "s3:bucket/secret", "s3://", "s3:///secret", "s3://bucket/a//secret",
        "s3://bucket/../secret", "s3://bucket/./secret", "S3://bucket/secret",
    ],
)  # fmt: skip
def test_s3_urls_that_hold_more_than_bucket_and_prefix_are_refused(url):
    with pytest.raises(ValueError, match=r"s3://bucket/prefix, .*without a user") as error:
        open_storage(url)
    assert "secret" not in str(error.value)


def test_an_s3_prefix_is_taken_literally():
    assert open_storage("s3://bucket/a%20b/c d/").url == "s3://bucket/a%20b/c d"
    assert open_storage("s3://bucket").url == open_storage("s3://bucket/").url == "s3://bucket"
