"""POSIX storage: what is flushed and when, and what a crash or an error leaves."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from pipeline.storage import local as local_storage
from pipeline.storage.interface import UnsafePathError
from pipeline.storage.local import LocalStorage
from tests.support.read_parts import read_parts

CRASHER = """
import os, sys
from pathlib import Path
from pipeline.storage.local import LocalStorage
os.link = lambda *names: os._exit(9)
LocalStorage(Path(sys.argv[1])).create("commits/task.0000.json", b"half")
"""


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "store")


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


def test_a_file_that_is_there_is_not_written_again(storage):
    storage.create("file", b"")
    with pytest.raises(FileExistsError):
        storage.open_write("file")


def test_listing_files_follows_no_link_and_leaves_out_what_goes(storage, tmp_path, monkeypatch):
    storage.create("a/x", b"12")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"1")
    (storage.root / "a" / "link").symlink_to(tmp_path / "outside")
    storage.create("a/gone", b"")
    files = storage.list_files("a")
    found = [next(files)]
    for name in ("gone", "x"):
        (storage.root / "a" / name).unlink()
    found += files
    assert {path for path, _ in found} <= {"a/x", "a/gone"}
    assert len(found) == 1


def test_a_files_time_is_its_mtime(storage):
    path = "layer/commits/task.0000.json"
    storage.create(path, b"{}")
    os.utime(storage.root / path, (1.5, 1.5))
    assert storage.find_time(path) == 1.5
    assert storage.list_times("layer/commits") == {}  # a look at each file would cost too much


def test_parts_fill_memories_one_after_another(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    storage = LocalStorage(tmp_path)
    found = read_parts(storage, "a", (90, [4, 6]), (3, [1]), (0, []))
    assert found == [bytes(range(90, 94)), bytes(range(94, 100)), b"\3"]
    assert read_parts(storage, "a", (0, [1]), (95, [3, 3])) is None
    assert read_parts(storage, "a", (200, [1])) is None
    assert [storage.read_range("a", *x) for x in [(1, 2), (99, 5)]] == [b"\1\2", b"c"]
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_parts(storage, "nothing", (0, [1]))
    with pytest.raises(UnsafePathError, match="inside the store"):
        read_parts(storage, "../a", (0, [1]))


def test_more_memories_than_a_system_call_takes(tmp_path):
    data = np.random.default_rng(0).bytes(5000)
    (tmp_path / "a").write_bytes(data)
    assert b"".join(read_parts(LocalStorage(tmp_path), "a", (0, [2] * 2500))) == data


def test_a_read_that_comes_in_pieces_is_put_together(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    whole = os.preadv

    def preadv(descriptor, memories, start):
        return whole(descriptor, [memories[0][:3]], start)

    monkeypatch.setattr(os, "preadv", preadv)
    found = read_parts(LocalStorage(tmp_path), "a", (10, [5, 1, 4]))
    assert b"".join(found) == bytes(range(10, 20))


def test_files_kept_open_are_those_under_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr(local_storage, "_CHECK_S", 0.0)
    storage = LocalStorage(tmp_path)
    (tmp_path / "a").write_bytes(b"old")
    assert read_parts(storage, "a", (0, [3])) == [b"old"]
    (tmp_path / "b").write_bytes(b"new")
    (tmp_path / "b").replace(tmp_path / "a")
    assert read_parts(storage, "a", (0, [3])) == [b"new"]
    (tmp_path / "a").unlink()
    with pytest.raises(FileNotFoundError, match="a"):
        read_parts(storage, "a", (0, [3]))


def test_files_are_closed_with_the_storage_and_not_sent_to_a_process(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    before = set(os.listdir("/proc/self/fd"))
    storage = LocalStorage(tmp_path)
    read_parts(storage, "a", (0, [3]))
    copied = pickle.loads(pickle.dumps(storage))
    assert read_parts(copied, "a", (0, [3])) == [b"abc"]
    assert len(set(os.listdir("/proc/self/fd")) - before) == 2
    del storage, copied
    assert set(os.listdir("/proc/self/fd")) == before
