"""The watchdog: what it kills, what it never kills, and what it leaves behind (nothing)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.stage.watchdog import Watchdog
from pipeline.stage.watchdog_process import StallTimer

ROOT = Path(__file__).parents[3]
STALL_S = 1

START = f"""
import sys, time
from pipeline.stage.watchdog import Watchdog
watchdog = Watchdog(stall_s={STALL_S})
print(watchdog._process.pid, flush=True)
"""
HANG = "time.sleep(60)\n"
BEAT = f"""
for _ in range(30):
    time.sleep({STALL_S} / 10)
    watchdog.beat("unet")
"""
# Scripts that end by themselves, so that one killed wrongly is seen by its status.
WELL = {
    "idle": f"time.sleep(2.5 * {STALL_S})",
    "idle again": f'with watchdog.working("a"): pass\ntime.sleep(2.5 * {STALL_S})',
    "beats": 'watchdog.begin("a")' + BEAT,
    "another thread beats": f"""
import threading
with watchdog.working("a"):
    beating = threading.Thread(target=exec, args=({BEAT!r}, globals()))
    beating.start()
    beating.join()
""",
    "tasks end without a beat": f"""
watchdog.begin("a")
for i in range(30):
    with watchdog.working(str(i)):
        time.sleep({STALL_S} / 10)
watchdog.end("a")
""",
}


@pytest.fixture
def start():
    """A function: the rest of a script -> (its process, the id of its watchdog)."""
    started = []

    def start(rest):
        process = subprocess.Popen(
            [sys.executable, "-c", START + rest], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def test_a_stall_is_killed_and_says_where(start):
    process, pid = start(
        'watchdog.begin("tar-1"); watchdog.begin("tar-2"); watchdog.begin("gone")\n'
        'watchdog.end("gone"); watchdog.beat("vae"); watchdog.beat("unet")\n' + HANG
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert errors == (
        "ldznet: no progress for 1 s in task(s) tar-1, tar-2 (the last in stage unet): "
        "worker killed; Ray starts another and tries again\n"
    )
    wait_until(lambda: not is_running(pid))


def test_work_that_never_made_progress_is_killed(start):
    process, _ = start('watchdog.begin("tar-1")\n' + HANG)
    assert "in task(s) tar-1: worker killed" in process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGKILL


def test_a_parent_that_beats_until_it_is_halted_is_killed(start):
    process, _ = start('watchdog.begin("tar-1"); print("on", flush=True)\n' + BEAT * 20)
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    assert process.wait(60) == -signal.SIGKILL
    assert "no progress for 1 s in task(s) tar-1" in process.stderr.read()


def test_a_parent_halted_with_nothing_in_hand_is_killed(start):
    """Or the next task that it is given would wait for ever."""
    process, _ = start(HANG)
    process.send_signal(signal.SIGSTOP)
    assert process.wait(60) == -signal.SIGKILL
    assert "stopped by a signal for 1 s with no task in hand" in process.stderr.read()


def test_a_parent_that_is_well_is_left_alone(start):
    processes = {name: start(script) for name, script in WELL.items()}
    for name, (process, pid) in processes.items():
        _, errors = process.communicate(timeout=60)
        assert (name, process.returncode, errors) == (name, 0, "")
        wait_until(lambda pid=pid: not is_running(pid))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_parent(start, number):
    """A fork of the parent lives on, and holds all that the parent held."""
    process, pid = start("import os\nif child := os.fork(): print(child, flush=True)\n" + HANG)
    child = int(process.stdout.readline())
    try:
        assert is_running(pid)
        process.send_signal(number)
        assert process.wait(60) == -number
        wait_until(lambda: not is_running(pid))
        assert is_running(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_signals_for_the_group_do_not_end_it(start):
    process, pid = start('watchdog.begin("tar-1")\n' + HANG)
    assert os.getpgid(pid) == pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        wait_until(lambda: _ignored(pid))
        os.kill(pid, number)
    assert process.wait(60) == -signal.SIGKILL


def _ignored(pid):
    """Whether it has come so far as to ignore the three."""
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().split("\n") if "SigIgn" in x)
    mask = sum(1 << number - 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    return int(line.split()[1], 16) & mask == mask


def test_its_death_is_told_once_and_the_work_goes_on(caplog):
    watchdog = Watchdog(stall_s=60)
    os.kill(watchdog._process.pid, signal.SIGKILL)
    wait_until(lambda: not is_running(watchdog._process.pid))
    for _ in range(3):
        with watchdog.working("tar-1"):
            watchdog.beat("unet")
    watchdog.close()
    assert [record.message for record in caplog.records] == [
        "the watchdog process ended (status -9): this worker goes on, and will not be killed if "
        "it hangs"
    ]


def test_nothing_is_left_after_close(caplog):
    before = sorted(os.listdir("/proc/self/fd"))
    for closes in (True, False):
        watchdog = Watchdog(stall_s=60)
        pid = watchdog._process.pid
        watchdog.begin("tar-1")
        if closes:
            watchdog.close()
            watchdog.close()
            watchdog.beat("unet")
            watchdog.end("tar-1")
            watchdog.begin("tar-2")
        else:
            del watchdog
        assert not Path(f"/proc/{pid}").exists()  # not even as a zombie
        assert sorted(os.listdir("/proc/self/fd")) == before
    assert caplog.records == []


@pytest.mark.parametrize("stall_s", [0, -1, float("nan"), float("inf")])
def test_what_is_no_time_is_refused(stall_s):
    with pytest.raises(ValueError, match="stall_s must be a positive number of seconds, but got"):
        Watchdog(stall_s=stall_s)


def look_often(times_s, *, progress=lambda s: 0, waited_for=lambda s: True):
    """The times at which it says "silent", of looks at ``times_s``."""
    timer = StallTimer(stall_s=10, step_s=1, now_s=0)
    return [
        s for s in times_s if timer.update(now_s=s, progress=progress(s), waited_for=waited_for(s))
    ]


def test_silence_is_counted_from_the_last_progress_or_the_last_rest():
    assert look_often(range(1, 14)) == [11, 12, 13]  # the first look is the first it knows of
    assert look_often(range(1, 30), progress=lambda s: s // 10) == []
    assert look_often(range(1, 30), progress=lambda s: s // 11) == [21]
    assert look_often(range(1, 30), waited_for=lambda s: s > 15) == [25, 26, 27, 28, 29]
    assert look_often(range(1, 30), waited_for=lambda s: s % 10 > 0) == []


def test_a_step_in_which_the_machine_slept_counts_as_one():
    asleep = [1, 2, 3, 5000, 5001, 5002, 90000, 90001, 90002]
    assert look_often(asleep) == []
    assert look_often([*asleep, 90003, 90004, 90005]) == [90004, 90005]
    assert look_often([s / 2 for s in range(1, 30)])[0] == 10.5  # looks that come early
