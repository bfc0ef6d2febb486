"""POSIX storage: what is flushed and when, and what a crash or an error leaves."""

import os
import subprocess
import sys

import pytest

from pipeline.local_storage import LocalStorage

CRASHER = """
import os, sys
from pathlib import Path
from pipeline.local_storage import LocalStorage
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
