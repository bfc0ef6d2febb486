"""Files written whole: the old one or the new one, flushed with the folder that names it."""

import os

import pytest

from pipeline.base.whole_file import open_whole, write_whole


def test_text_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    write_whole(path, "äb\n")
    assert path.read_bytes() == "äb\n".encode()
    write_whole(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_file_and_folder_are_flushed_around_the_rename(tmp_path, monkeypatch):
    flushed = []
    real = os.fsync

    def note(descriptor):
        flushed.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "file").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_whole(tmp_path / "file", "x")
    (file, before), (folder, after) = flushed
    assert os.path.dirname(file) == folder == str(tmp_path)
    assert (before, after) == (False, True)


def test_a_block_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(ValueError, match="torn"), open_whole(path) as file:  # noqa: PT012
        file.write(b"half")
        raise ValueError("torn")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"
