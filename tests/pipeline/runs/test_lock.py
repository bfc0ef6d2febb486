"""One run at a time on a folder: live holders are respected, dead and sleeping ones are not."""

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pipeline.runs import lock as run_lock
from pipeline.runs.lock import RunHeldError, RunLock, read_newest

FORK = multiprocessing.get_context("fork")


def _hold(out, entered, leave):
    with RunLock(out, "run"):
        entered.set()
        leave.wait(60)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder, and the event that has it leave."""
    entered, leave = FORK.Event(), FORK.Event()
    process = FORK.Process(target=_hold, args=(tmp_path, entered, leave))
    process.start()
    assert entered.wait(30)
    yield process, leave
    process.kill()
    process.join()


def list_claims(out):
    return sorted(path.name for path in (out / "lock/run").glob("*.json"))


def pretend_elsewhere(out):
    """Make the claim one of another machine."""
    path = out / "lock/run" / list_claims(out)[-1]
    touched = path.stat().st_mtime_ns
    path.write_text(json.dumps({**json.loads(path.read_text()), "place": "there", "host": "h2"}))
    os.utime(path, ns=(touched, touched))


def test_a_second_run_is_refused_and_told_who_holds(tmp_path, holder):
    process, _ = holder
    with pytest.raises(RunHeldError, match=f"{tmp_path}: another run .* process {process.pid} on"):
        RunLock(tmp_path, "run").__enter__()
    with RunLock(tmp_path, "other"), RunLock(tmp_path / "else", "run"):
        pass


def test_asking_for_a_holder_writes_nothing(tmp_path, holder):
    process, leave = holder
    with pytest.raises(RunHeldError, match=f"process {process.pid} on"):
        RunLock(tmp_path, "run").check_free()
    RunLock(tmp_path / "new", "run").check_free()
    assert not (tmp_path / "new").exists()
    leave.set()
    process.join(30)
    RunLock(tmp_path, "run").check_free()


def test_what_was_left_is_free_at_once_and_one_file_stays(tmp_path):
    for _ in range(3):
        with RunLock(tmp_path, "run"):
            assert len(list_claims(tmp_path)) == 1
    assert list_claims(tmp_path) == ["00000003.json"]


def test_a_killed_holder_of_this_machine_is_followed_at_once(tmp_path, holder):
    """Also while its parent has not heard of its death."""
    process, _ = holder
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with RunLock(tmp_path, "run"):
        assert read_newest(tmp_path / "lock/run")[1].pid == os.getpid()


def test_waiting_for_a_holder_to_leave(tmp_path, holder):
    _, leave = holder
    threading.Timer(0.3, leave.set).start()
    with RunLock(tmp_path, "run", wait_s=30):
        assert list_claims(tmp_path) == ["00000002.json"]


def test_a_holder_elsewhere_is_judged_by_its_touches_alone(tmp_path, holder, monkeypatch, caplog):
    """Whatever the clocks say: this one's last touch lies a day ahead."""
    monkeypatch.setattr(run_lock, "STALE_S", 1.0)
    monkeypatch.setattr(run_lock, "POLL_S", 0.05)
    pretend_elsewhere(tmp_path)
    path = tmp_path / "lock/run" / list_claims(tmp_path)[0]
    ahead_ns = time.time_ns() + 86400 * 10**9
    os.utime(path, ns=(ahead_ns, ahead_ns))
    stop = threading.Event()

    def touch():
        number = 0
        while not stop.wait(0.1):
            number += 1
            os.utime(path, ns=(ahead_ns + number, ahead_ns + number))

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(RunHeldError, match="on h2"):
            RunLock(tmp_path, "run").__enter__()
    finally:
        stop.set()
        thread.join()
    (told,) = caplog.messages  # at once, and once
    assert "on h2; waiting up to 1 s to see whether it ends" in told
    with RunLock(tmp_path, "run"):  # it touches no more
        assert list_claims(tmp_path) == ["00000002.json"]


def test_a_holder_that_only_slept_ends_when_it_wakes(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    monkeypatch.setattr(run_lock, "STALE_S", 0.5)
    monkeypatch.setattr(run_lock, "POLL_S", 0.05)
    entered, leave = FORK.Event(), FORK.Event()
    process = FORK.Process(target=_hold, args=(tmp_path, entered, leave))
    process.start()
    assert entered.wait(30)
    os.kill(process.pid, signal.SIGSTOP)
    pretend_elsewhere(tmp_path)
    with RunLock(tmp_path, "run", wait_s=30):
        os.kill(process.pid, signal.SIGCONT)
        process.join(30)
        assert process.exitcode == 1
        assert read_newest(tmp_path / "lock/run")[1].pid == os.getpid()


def _hold_unreadable(out, entered, seconds):
    """Hold a folder whose file server fails for so long, from the second beat on."""
    failing_s = float("inf")

    def fail(folder):
        nonlocal failing_s
        failing_s = min(failing_s, time.monotonic())
        if time.monotonic() < failing_s + seconds:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read_newest(folder)

    with RunLock(out, "run") as lock:
        run_lock.read_newest = fail
        entered.set()
        time.sleep(2)
        if not lock._thread.is_alive():
            os._exit(3)


@pytest.mark.parametrize(("seconds", "status"), [(0.3, 0), (60, 1)])
def test_a_holder_outlives_a_failing_server_until_another_may_follow(
    tmp_path, monkeypatch, seconds, status
):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    monkeypatch.setattr(run_lock, "STALE_S", 1.0)
    entered = FORK.Event()
    process = FORK.Process(target=_hold_unreadable, args=(tmp_path, entered, seconds))
    process.start()
    assert entered.wait(30)
    process.join(30)
    assert process.exitcode == status


def test_leaving_on_a_full_disk_says_what_the_run_ended_with(tmp_path, monkeypatch, caplog):
    def write_text(path, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(KeyboardInterrupt), RunLock(tmp_path, "run"):  # noqa: PT012
        monkeypatch.setattr(Path, "write_text", write_text)
        raise KeyboardInterrupt
    assert "No space left on device; the claim is removed instead" in caplog.text
    monkeypatch.undo()
    with RunLock(tmp_path, "run"):
        pass


def test_of_two_that_found_the_same_number_one_has_it(tmp_path):
    (tmp_path / "lock/run").mkdir(parents=True)
    first, second = RunLock(tmp_path, "run"), RunLock(tmp_path, "run")
    first._claim(4)
    second._claim(4)
    assert (first._number, second._number) == (4, 0)


def _claim_and_tell(out, results, barrier):
    barrier.wait(30)
    try:
        with RunLock(out, "run"):
            results.put(True)
            barrier.wait(30)
    except RunHeldError:
        results.put(False)
        barrier.wait(30)


def test_of_several_that_come_at_once_one_enters(tmp_path):
    results, barrier = FORK.Queue(), FORK.Barrier(4)
    processes = [
        FORK.Process(target=_claim_and_tell, args=(tmp_path, results, barrier)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=60) for _ in processes) == [False, False, False, True]
    for process in processes:
        process.join(30)


def test_a_claim_that_a_kill_cut_short_is_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "STALE_S", 0.2)
    monkeypatch.setattr(run_lock, "POLL_S", 0.05)
    (tmp_path / "lock/run").mkdir(parents=True)
    (tmp_path / "lock/run/00000007.json").touch()
    with RunLock(tmp_path, "run"):
        assert list_claims(tmp_path) == ["00000008.json"]
