"""What only Linux has is taken away, as on macOS: everything works without it."""

import ast
import errno
import fcntl
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.base.whole_file import write_whole
from pipeline.bench import fresh_process
from pipeline.corpus.members import Limits, SampleMembers
from pipeline.corpus.tar import Member
from pipeline.decode.process import DecodeProcess
from pipeline.decode.views import Cutting
from pipeline.runs import lock as run_lock
from pipeline.runs.lock import RunHeldError, RunLock, read_newest
from pipeline.stage import watchdog
from pipeline.storage.local import LocalStorage

ROOT = Path(__file__).parents[3]
FORK = multiprocessing.get_context("fork")

# Names that Linux alone has, or macOS lacks in some version, and the only files that may use them.
GUARDED = {
    "EUCLEAN": {"pipeline/upkeep/verify.py"},
    "F_SETPIPE_SZ": {"pipeline/decode/process.py"},
    "RLIMIT_AS": {"pipeline/decode/worker.py"},
    "memfd_create": {"pipeline/base/child_process.py"},
    "pidfd_open": {"pipeline/stage/watchdog_process.py"},
    "pidfd_send_signal": {"pipeline/stage/watchdog_process.py"},
    "preadv": {"pipeline/storage/local.py"},
    "sched_getaffinity": {"pipeline/storage/local.py"},
}
UNUSED = {
    *("O_DIRECT", "O_TMPFILE", "copy_file_range", "epoll", "eventfd", "pipe2", "posix_fadvise"),
    *("posix_fallocate", "prctl", "prlimit", "process_cpu_count", "pwritev", "sendfile", "setns"),
    *("sched_setaffinity", "signalfd", "splice", "timerfd_create", "unshare", "malloc_trim"),
}
PROC_FILES = {
    "pipeline/bench/fresh_process.py",
    "pipeline/runs/lock.py",
    "pipeline/stage/watchdog_process.py",
}


def list_sources():
    for package in ("models", "pipeline", "jobs"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_what_linux_alone_has_is_used_only_where_its_absence_is_tested():
    found, proc = {}, set()
    for name, tree in list_sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in GUARDED.keys() | UNUSED:
                found.setdefault(node.attr, set()).add(name)
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and text.startswith(("/proc", "/sys/", "/dev/shm")):
                proc.add(name)
    assert found == GUARDED
    assert proc == PROC_FILES


@pytest.mark.parametrize("name", ["sched_getaffinity", "preadv"])
def test_a_store_is_read_without(tmp_path, monkeypatch, name):
    monkeypatch.delattr(os, name)
    storage = LocalStorage(tmp_path)
    (tmp_path / "x").write_bytes(bytes(range(100)))
    assert 1 <= storage.reads_at_once <= 4
    first, second, empty = bytearray(10), bytearray(30), bytearray()
    assert storage.read_into("x", [(5, [first, empty]), (40, [memoryview(second)])])
    assert (first, second) == (bytes(range(5, 15)), bytes(range(40, 70)))
    assert storage.read_into("x", [(0, [bytearray(1) for _ in range(100)])])
    assert not storage.read_into("x", [(95, [bytearray(3), bytearray(3)])])


def encode_png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def decode_one():
    """Decode a sample of some MB, more than a pipe holds, in a worker."""
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
    data = {"a.png": encode_png(pixels), "a.json": b"", "a.mask0.png": encode_png(pixels[..., 0])}
    members = [Member(name, "file", 0, len(content)) for name, content in data.items()]
    sample = SampleMembers("a", members[0], members[1], (members[2],))
    process = DecodeProcess(memory_bytes=1 << 32, base_s=60, s_per_mpx=1)
    try:
        process.await_ready()
        cut = process.cut_sample(
            sample,
            lambda member: data[member.name],
            cutting=Cutting(1024, "center", 1, False, 1, 0),
            limits=Limits(),
        )
    finally:
        process.end()
    ((image, (mask,), _),) = cut.pixels
    np.testing.assert_array_equal(image, pixels)
    np.testing.assert_array_equal(mask, pixels[..., 0] >= 128)


def test_a_sample_is_decoded_through_pipes_of_the_usual_size(monkeypatch):
    monkeypatch.delattr(fcntl, "F_SETPIPE_SZ")
    decode_one()


def test_a_sample_is_decoded_without_a_file_in_memory(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    decode_one()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="files in memory are Linux' own")
def test_a_sample_is_decoded_where_no_temporary_file_can_be_made(tmp_path, monkeypatch):
    """A worker's status was written to TMPDIR: a full one crashed it, and rejected the sample."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    decode_one()


def test_a_sample_is_decoded_where_address_space_cannot_be_bounded(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, resource\n"
        "set_limit = resource.setrlimit\n"
        "def refuse(which, limits):\n"
        "    if which == resource.RLIMIT_AS:\n"
        f"        pathlib.Path({str(tmp_path / 'asked')!r}).touch()\n"
        "        raise ValueError('current limit exceeds maximum limit')\n"
        "    set_limit(which, limits)\n"
        "resource.setrlimit = refuse\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    decode_one()
    assert (tmp_path / "asked").exists()


def test_a_worker_that_hangs_is_killed_without_a_pidfd_or_a_file_in_memory(tmp_path):
    program = tmp_path / "watchdog_process.py"
    program.write_text(
        "import os, runpy, signal\n"
        "del os.pidfd_open, signal.pidfd_send_signal\n"
        f"runpy.run_path({str(watchdog._PROGRAM)!r}, run_name='__main__')\n"
    )
    script = (
        "import os, pathlib, time\n"
        "from pipeline.stage import watchdog\n"
        "del os.memfd_create\n"
        f"watchdog._PROGRAM = pathlib.Path({str(program)!r})\n"
        "watched = watchdog.Watchdog(stall_s=1)\n"
        "watched.begin('a')\n"
        "time.sleep(60)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == -signal.SIGKILL
    assert "no progress for 1 s in task(s) a: worker killed" in ended.stderr


def hold(out, entered, leave):
    with RunLock(out, "run"):
        entered.set()
        leave.wait(60)


def test_without_proc_a_holder_of_a_folder_is_judged_by_its_touches(tmp_path, monkeypatch):
    """Also one whose number another process has now: it is followed once it touches no more."""
    monkeypatch.setattr(run_lock, "_PROC", tmp_path / "none")
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    monkeypatch.setattr(run_lock, "STALE_S", 1.5)
    monkeypatch.setattr(run_lock, "POLL_S", 0.05)
    entered, leave = FORK.Event(), FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, entered, leave))
    process.start()
    assert entered.wait(30)
    with pytest.raises(RunHeldError, match=f"process {process.pid} on"):
        RunLock(tmp_path, "run").__enter__()
    process.kill()
    process.join()
    claim = tmp_path / "lock/run/00000001.json"
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "pid": os.getpid()}))
    with RunLock(tmp_path, "run"):
        number, holder = read_newest(tmp_path / "lock/run")
        assert (number, holder.pid, holder.place, holder.started) == (2, os.getpid(), "", 0)


@pytest.mark.parametrize("supported", [True, False])
def test_on_macos_a_file_is_flushed_through_the_drives_cache(tmp_path, monkeypatch, supported):
    flushed = []

    def control(descriptor, command):
        assert command == 51
        flushed.append("full")
        if not supported:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append("usual"))
    write_whole(tmp_path / "x", b"1")
    assert flushed == (["full"] if supported else ["full", "usual"]) * 2  # the file, its folder


def test_verify_is_there_without_linux_word_for_damage():
    script = "import errno; del errno.EUCLEAN; import pipeline.upkeep.verify"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_memory_is_measured_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(fresh_process, "_STATUS", tmp_path / "none")
    assert fresh_process.read_memory_mb("VmHWM") > 0
