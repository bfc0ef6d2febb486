"""Local storage: paths that stay inside, durable files, records created by one racer alone."""

import os
import subprocess
import sys

import pytest

from pipeline.storage import LocalStorage, UnsafePathError, check_path, open_storage

RACER = """
import sys
from pathlib import Path
from pipeline.storage import LocalStorage
storage = LocalStorage(Path(sys.argv[1]))
for line in sys.stdin:
    won = storage.create(f"commits/task.{line.strip()}.json", sys.argv[2].encode() * 1000)
    print(int(won), flush=True)
"""
CRASHER = """
import os, sys
from pathlib import Path
from pipeline.storage import LocalStorage
os.link = lambda *names: os._exit(9)
LocalStorage(Path(sys.argv[1])).create("commits/task.0000.json", b"half")
"""


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "store")


@pytest.mark.parametrize("path", ["a", "a/b", "a/b.c/d e", "a/...", ".a/b", "a//b", "ä/b"])
def test_plain_relative_paths_pass(path):
    assert check_path(path) == path


@pytest.mark.parametrize(
    "path", ["", ".", "/", "/a", "//a", "..", "a/..", "../a", "a/../b", "a\\b", "..\\a", "a\0b"]
)
def test_paths_that_may_leave_the_store_are_refused(storage, path):
    with pytest.raises(UnsafePathError, match="expected a relative path inside the store"):
        check_path(path)
    with pytest.raises(UnsafePathError, match="inside the store"):
        storage.read(path)


def test_a_file_is_written_once_with_its_digest(storage):
    with storage.open_write("a/b/file") as file:
        file.write(b"one")
        file.write(memoryview(bytearray(b"two")))
    assert storage.read("a/b/file") == b"onetwo"
    assert storage.digest("a/b/file") == (6, file.sha256)
    assert (file.num_bytes, storage.size("a/b/file")) == (6, 6)
    with pytest.raises(FileExistsError):
        storage.open_write("a/b/file")


def test_ranges_end_with_the_file(storage):
    with storage.open_write("file") as file:
        file.write(bytes(range(10)))
    assert storage.read_range("file", 2, 3) == bytes([2, 3, 4])
    assert storage.read_range("file", 8, 5) == bytes([8, 9])
    assert storage.read_range("file", 20, 5) == b""
    with pytest.raises(FileNotFoundError):
        storage.read_range("none", 0, 1)


def test_names_of_a_folder(storage):
    assert list(storage.list_names()) == []
    storage.create("a/x", b"")
    storage.create("b", b"")
    assert sorted(storage.list_names()) == ["a", "b"]
    assert list(storage.list_names("a")) == ["x"]
    assert list(storage.list_names("none")) == []


def test_create_is_for_the_first_alone(storage):
    assert storage.create("commits/r", b"first")
    assert not storage.create("commits/r", b"second")
    assert storage.read("commits/r") == b"first"
    assert list(storage.list_names("commits")) == ["r"]  # no temporary file stays


def test_of_eight_racing_processes_one_wins_each_round(storage):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(storage.root), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    winners = []
    for number in range(25):
        for racer in racers:
            racer.stdin.write(f"{number:04d}\n")
            racer.stdin.flush()
        won = [i for i, racer in enumerate(racers) if racer.stdout.readline().strip() == "1"]
        assert len(won) == 1, f"round {number}: {won}"
        record = storage.read(f"commits/task.{number:04d}.json")
        assert record == str(won[0]).encode() * 1000
        winners += won
    for racer in racers:
        racer.communicate(timeout=30)
        assert racer.returncode == 0
    assert len(list(storage.list_names("commits"))) == 25
    assert len(set(winners)) > 1  # else nobody raced


def test_a_crash_before_the_link_leaves_no_record(storage):
    crashed = subprocess.run([sys.executable, "-c", CRASHER, str(storage.root)], check=False)
    assert crashed.returncode == 9
    assert not storage.exists("commits/task.0000.json")
    left = list(storage.list_names("commits"))
    assert len(left) == 1
    assert left[0].startswith(".task.0000.json.")
    assert storage.create("commits/task.0000.json", b"whole")
    assert storage.read("commits/task.0000.json") == b"whole"


def test_a_record_is_flushed_before_it_is_linked_and_its_folders_after(storage, monkeypatch):
    events = []
    fsync, link = os.fsync, os.link

    def record_fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_link(source, target):
        events.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "link", record_link)
    storage.create("layer/commits/r", b"data")
    root = str(storage.root)
    assert events[0].startswith(f"{root}/layer/commits/.r.")
    assert events[1:] == ["link", f"{root}/layer/commits", f"{root}/layer", root]


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_a_failed_create_leaves_nothing(storage, monkeypatch, step):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        storage.create("commits/r", b"data")
    assert list(storage.list_names("commits")) == []


def test_every_folder_of_an_attempt_is_flushed(storage, monkeypatch):
    storage.create("layer/data/task/attempt/group/x", b"")
    flushed = []
    fsync = os.fsync

    def record_fsync(descriptor):
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    storage.sync_folders("layer/data/task/attempt")
    root = str(storage.root)
    below = ("layer", "data", "task", "attempt", "group")
    assert set(flushed) == {"/".join([root, *below[:n]]) for n in range(6)}


def test_an_error_inside_a_file_closes_it_unflushed(storage, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("flushed"))
    file = storage.open_write("file")

    def write_half():
        with file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert file._file.closed


def test_paths_and_file_urls_open_the_same_store(tmp_path, monkeypatch):
    folder = tmp_path / "a b#1"
    assert open_storage(str(folder)).root == folder
    assert open_storage(folder.as_uri()).root == folder
    monkeypatch.chdir(tmp_path)
    assert open_storage("store").url == str(tmp_path / "store")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_storage("~/store").url == str(tmp_path / "store")


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/store", "gs://b/s", "memory://s", "s3:b"])
def test_other_schemes_are_refused_without_showing_the_url(url):
    scheme = url.split(":")[0]
    with pytest.raises(ValueError, match=f"scheme '{scheme}'; .* POSIX file systems only") as error:
        open_storage(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["simplecache::s3://b/s", "simplecache::file:///s", "a::b"])
def test_chained_urls_are_refused(url):
    with pytest.raises(ValueError, match="expected a local path"):
        open_storage(url)


@pytest.mark.parametrize("url", ["", "file://", "file://host/store", "file:///store?x=1"])
def test_urls_that_would_lose_a_part_are_refused(url):
    with pytest.raises(ValueError, match=r"expected a path or file:///path"):
        open_storage(url)
