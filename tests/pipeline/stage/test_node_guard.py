"""A machine at fault gets no work: pauses that grow, a test after each, and whose fault it was."""

import errno
import threading

import pytest
import torch

from pipeline.base.node_fault import NodeError
from pipeline.stage.lanes import StageClosedError
from pipeline.stage.node_guard import NodeGuard, find_fault


class Time:
    """A clock that waiting advances; the stage is closed after ``closed_s``."""

    def __init__(self):
        self.now_s, self.closed_s = 0.0, float("inf")

    def wait(self, seconds):
        self.now_s += seconds
        return self.now_s >= self.closed_s


class Disk:
    """Full until it is not."""

    full, num_checks = True, 0

    def check(self):
        self.num_checks += 1
        if self.full:
            raise OSError(errno.ENOSPC, "full")

    def fault(self):
        return NodeError(errno.ENOSPC, "no room", check=self.check)


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def guard(time):
    return NodeGuard(time.wait, clock=lambda: time.now_s)


def test_a_sound_machine_is_not_tested_and_waits_for_nothing(guard, time):
    assert guard.admit() is None
    assert time.now_s == 0


def test_pauses_grow_and_each_ends_with_a_test(guard, time):
    disk = Disk()
    guard.report(disk.fault())
    ends = [time.now_s]
    for _ in range(6):
        assert "full" in str(guard.admit())
        time.now_s = guard._until_s
        ends.append(time.now_s)
    assert ends == [5, 15, 35, 75, 155, 275, 395]
    assert disk.num_checks == 6
    disk.full = False
    assert guard.admit() is None


def test_after_work_that_succeeded_the_pause_is_short_again(guard, time):
    """Until then it grows: the test may pass where the work does not."""
    disk = Disk()
    disk.full = False
    for ends_s in (5, 15):
        guard.report(disk.fault())
        assert time.now_s == ends_s
        assert guard.admit() is None
    guard.note_success()
    guard.report(disk.fault())
    assert time.now_s == 20


def test_calls_that_fail_together_are_one_fault(guard, time):
    disk = Disk()
    for _ in range(4):
        time.now_s = 0
        guard.report(disk.fault())
        assert time.now_s == 5


def test_of_those_that_wait_one_tests_and_all_are_told(time):
    disk, answers, all_wait = Disk(), [], threading.Barrier(4)

    def wait(seconds):
        all_wait.wait(60)
        time.now_s = 5.0
        return False

    guard = NodeGuard(wait, clock=lambda: time.now_s)
    guard._begin(disk.fault())
    threads = [threading.Thread(target=lambda: answers.append(guard.admit())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    assert all(answers)
    assert disk.num_checks == 1


def test_a_stage_that_is_closed_ends_the_pause_without_a_test(guard, time):
    disk, time.closed_s = Disk(), 3.0
    with pytest.raises(StageClosedError):
        guard.report(disk.fault())
    time.now_s = 0.0
    with pytest.raises(StageClosedError):
        guard.admit()
    assert disk.num_checks == 0


def from_(error, cause):
    error.__cause__ = cause
    return error


class NoCredentialsError(Exception):
    """As botocore's."""


@pytest.mark.parametrize(
    "error",
    [
        NodeError(errno.ENOSPC, "no room"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("No CUDA GPUs are available"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        from_(OSError("s3://b/a.tar: could not be read"), NoCredentialsError()),
    ],
)
def test_what_says_something_of_the_machine(error):
    assert find_fault(error, check_device=lambda: None) is not None


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),  # of the store, if not said otherwise
        PermissionError("s3://b/a.tar: HTTP 403"),
        FileNotFoundError(errno.ENOENT, "gone"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("The size of tensor a (3) must match"),
        ValueError("CUDA error in a file's name"),
    ],
)
def test_what_says_nothing_of_it(error):
    assert find_fault(error, check_device=lambda: None) is None
