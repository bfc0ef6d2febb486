"""Copies of remote files: what is tried again, what is not, what is told meanwhile."""

import errno
import importlib.util
import shutil
import subprocess
import sys

import fsspec
import pytest

import pipeline.base.remote_copy
from pipeline.base.outages import FIRST_S, MAX_PAUSE_S, OutageError
from pipeline.base.remote_copy import as_oserror, copy_file, open_filesystem, retry
from tests.support.fake_time import FakeTime, make_patience

URL = "memory://bucket/a.tar"
DATA = bytes(range(256)) * 1000


@pytest.fixture(autouse=True)
def time(monkeypatch):
    """The clock of the process's patience, in which no time passes."""
    time = FakeTime()
    monkeypatch.setattr(pipeline.base.remote_copy, "PATIENCE", make_patience(600, time))
    return time


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe_file("/bucket/a.tar", DATA)
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def fail_first(monkeypatch, filesystem, errors):
    """Let ``get_file`` raise these first, each after a cut copy; return the list of calls."""
    calls, copy = [], type(filesystem).get_file

    def get_file(self, path, target, **options):
        calls.append(path)
        if len(calls) > len(errors):
            copy(self, path, target, **options)
            return
        with open(target, "wb") as file:
            file.write(DATA[:100])
        options["callback"].relative_update(100)
        if error := errors[len(calls) - 1]:
            raise error

    monkeypatch.setattr(type(filesystem), "get_file", get_file)
    return calls


def copy(filesystem, folder, **options):
    """Copy into a file of the folder and return what is read from it after that."""
    options = {"url": URL, "num_bytes": len(DATA), "folder": folder, **options}
    with (folder / "a").open("w+b") as file:
        copy_file(filesystem, "/bucket/a.tar", file, **options)
        return file.read()


@pytest.mark.parametrize(
    "errors",
    [
        [ConnectionResetError("reset")],
        [TimeoutError("slow"), OSError(errno.EIO, "io"), BrokenPipeError("pipe")],
        [None, None],  # copies cut short that the library did not notice
    ],
)
def test_what_may_pass_is_tried_again(memory, monkeypatch, tmp_path, time, errors):
    calls = fail_first(monkeypatch, memory, errors)
    assert copy(memory, tmp_path) == DATA
    assert len(calls) == len(errors) + 1
    assert len(time.slept) >= len(errors)


def test_a_try_finds_nothing_of_the_one_before(memory, monkeypatch, tmp_path):
    """Also where to open a descriptor's path does not empty the file, as on macOS."""
    left = [bytes(2 * len(DATA)), DATA]

    def get_file(self, path, target, **options):
        data = left.pop(0)
        with open(target, "r+b") as file:
            file.write(data)
        if left:
            raise ConnectionResetError("reset")

    monkeypatch.setattr(type(memory), "get_file", get_file)
    assert copy(memory, tmp_path) == DATA


def test_an_outage_ends_with_patience(memory, monkeypatch, tmp_path, time):
    with pytest.raises(FileNotFoundError):  # the first answer, from where on patience is long
        retry(lambda: memory.info("/bucket/none"), what=URL)
    calls = fail_first(monkeypatch, memory, [ConnectionResetError("reset")] * 10**6)
    began_s, said = (
        time.now_s,
        r"a\.tar: could not be read: ConnectionResetError; memory://bucket has",
    )
    with pytest.raises(OutageError, match=said):
        copy(memory, tmp_path)
    assert time.now_s - began_s == pytest.approx(600, abs=1)
    assert len(calls) > 600 / MAX_PAUSE_S


def test_a_server_that_never_answered_has_a_short_time(memory, monkeypatch, tmp_path, time):
    fail_first(monkeypatch, memory, [ConnectionResetError("reset")] * 10**6)
    began_s = time.now_s
    with pytest.raises(OutageError, match=r"ConnectionResetError; .* has not answered"):
        copy(memory, tmp_path)
    assert time.now_s - began_s == pytest.approx(FIRST_S, abs=1)


def test_a_copy_that_stays_short_is_an_error(memory, monkeypatch, tmp_path):
    fail_first(monkeypatch, memory, [None] * 10**6)
    with pytest.raises(
        OSError, match=r"a\.tar: expected 256000 bytes as listed, got a copy of 100"
    ):
        copy(memory, tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        *(FileNotFoundError("gone"), PermissionError("denied")),
        *(OSError(errno.ENOSPC, "no space left"), OSError(errno.EINVAL, "precondition failed")),
        OSError(errno.EMFILE, "too many open files"),
    ],
)
def test_what_will_not_pass_is_tried_once(memory, monkeypatch, tmp_path, time, error):
    calls = fail_first(monkeypatch, memory, [error] * 9)
    with pytest.raises(type(error), match=str(error.args[-1])):
        copy(memory, tmp_path)
    assert (len(calls), time.slept) == (1, [])


def test_an_http_status_tells_a_denial_from_a_fault():
    aiohttp = pytest.importorskip("aiohttp")

    def refuse(status):
        with as_oserror("https://host/a.tar"):
            raise aiohttp.ClientResponseError(None, (), status=status)

    for status in (401, 403):
        with pytest.raises(PermissionError, match=r"a\.tar: could not be read"):
            retry(lambda status=status: refuse(status), what="a")
    for status in (400, 405, 412):
        with pytest.raises(
            OSError, match=f"could not be read: ClientResponseError {status}"
        ) as error:
            retry(lambda status=status: refuse(status), what="a")
        assert not isinstance(error.value, OutageError)
    for status in (429, 500, 503):
        with pytest.raises(
            OutageError, match=f"ClientResponseError {status}; .*not answered since"
        ):
            retry(lambda status=status: refuse(status), what="a")


def test_requests_of_http_have_no_end_in_all():
    pytest.importorskip("aiohttp")
    filesystem, _ = open_filesystem("https://host/a.tar")
    timeout = filesystem.client_kwargs["timeout"]
    assert (timeout.total, timeout.sock_read) == (None, 60)


class LibraryError(Exception):
    """As gcsfs' HttpError and azure's errors: no OSError, and a status under a name of its own."""

    def __init__(self, **fields):
        super().__init__("GET https://host/a.tar?signature=hush")
        self.__dict__.update(fields)


LibraryError.__module__ = "gcsfs.retry"


def raise_within(url, error):
    with as_oserror(url):
        raise error


@pytest.mark.parametrize("error", [LibraryError(), LibraryError(code=503), Exception("hush")])
def test_errors_of_any_library_are_tried_again_and_tell_no_secret(time, error):
    url = "gs://user:hush@bucket/a.tar?token=hush#hush"
    with pytest.raises(OSError, match=r"^gs://bucket/a\.tar: could not be read") as caught:
        retry(lambda: raise_within(url, error), what="a")
    assert "hush" not in str(caught.value)
    assert type(caught.value) is OutageError
    assert time.slept


@pytest.mark.parametrize("name", ["status", "status_code", "code"])
def test_a_denial_of_any_library_is_final(time, name):
    with pytest.raises(PermissionError, match=r"memory://bucket/a\.tar: could not be read"):
        retry(lambda: raise_within(URL, LibraryError(**{name: 403})), what="a")
    assert time.slept == []


@pytest.mark.parametrize("error", [TypeError("ours"), ImportError("no gcsfs"), ValueError("bad")])
def test_a_mistake_is_not_taken_for_a_remote_fault(error):
    with pytest.raises(type(error), match=str(error)):
        raise_within(URL, error)


@pytest.mark.parametrize("missing", ["aiohttp", "botocore"])
def test_a_package_that_is_not_installed_changes_nothing_for_others(missing):
    """In a process of its own: the module is imported without one of the two."""
    program = f"""
import sys
sys.modules[{missing!r}] = sys.modules[{missing + ".exceptions"!r}] = None
from pipeline.base import remote_copy
print(bool(remote_copy._HTTP))
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    expected = missing == "botocore" and importlib.util.find_spec("aiohttp") is not None
    assert result.stdout.strip() == str(expected)


def test_bytes_are_told_as_they_come(memory, monkeypatch, tmp_path):
    monkeypatch.setattr(type(memory), "blocksize", 100_000, raising=False)
    told = []
    copy(memory, tmp_path, on_bytes=told.append)
    assert sum(told) == len(DATA)
    assert len(told) >= 3


def test_a_library_that_says_where_it_is_counts_the_same(memory, monkeypatch, tmp_path):
    def get_file(self, path, target, callback):
        for at in (100_000, 200_000, len(DATA)):
            callback.absolute_update(at)
        with open(target, "wb") as file:
            file.write(DATA)

    monkeypatch.setattr(type(memory), "get_file", get_file)
    told = []
    copy(memory, tmp_path, on_bytes=told.append)
    assert told == [100_000, 100_000, 56_000]


def test_room_is_asked_for_before_anything_is_fetched(memory, monkeypatch, tmp_path):
    calls = fail_first(monkeypatch, memory, [])
    usage = shutil.disk_usage(tmp_path)._replace(free=len(DATA) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    message = rf"a\.tar: expected room .* 256000 bytes in {tmp_path}, got 255999 bytes .*TMPDIR"
    with pytest.raises(OSError, match=message) as error:
        copy(memory, tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert calls == []


def test_a_disk_that_fills_up_meanwhile_is_told_with_its_place(memory, monkeypatch, tmp_path):
    fail_first(monkeypatch, memory, [OSError(errno.ENOSPC, "no space left")])
    free = iter([10**9, 7])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=next(free)))
    with pytest.raises(OSError, match=rf"in {tmp_path}, got 7 bytes free"):
        copy(memory, tmp_path)
