"""What of training on Ray needs no Ray: room for the workers, errors that come again, the stop."""

import errno
import signal
import threading

import pytest
import torch

from pipeline.base.outages import OutageError
from pipeline.base.ray_cluster import NodeSize
from pipeline.base.yaml import SpecError
from pipeline.runs.checkpoint_writer import TakenOverError
from pipeline.runs.stop import STOP, StopRequest, asking_on_signals
from pipeline.store.commit import DamagedStoreError
from pipeline.train import workers as train_workers
from pipeline.train.workers import CLAIM, check_room, check_visible, is_final

TWO_NODES = [NodeSize(4, 1), NodeSize(2, 1)]


def test_room_for_the_workers():
    check_room(TWO_NODES, size=2, resources={"CPU": 2, "GPU": 1}, growing={})
    check_room(TWO_NODES, size=3, resources={"CPU": 2}, growing={})
    message = "room for 3 workers with 2 CPUs and 1 GPU each, .* 2 nodes have room for 2; give "
    with pytest.raises(ValueError, match=f"--workers: expected {message}--workers 2 or fewer"):
        check_room(TWO_NODES, size=3, resources={"CPU": 2, "GPU": 1}, growing={})
    with pytest.raises(ValueError, match="room for 3"):  # six CPUs, but not four on one node twice
        check_room(TWO_NODES, size=4, resources={"CPU": 2}, growing={})


def test_an_autoscaler_may_bring_the_room():
    growing = {"CPU": 16.0, "GPU": 4.0}
    check_room([], size=4, resources={"CPU": 2, "GPU": 1}, growing=growing)
    with pytest.raises(ValueError, match="room for 5 workers"):
        check_room([], size=5, resources={"CPU": 2, "GPU": 1}, growing=growing)


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (SpecError("another config"), True),
        (FloatingPointError("the loss is nan"), True),
        (OSError(errno.ENOSPC, "no space"), True),
        (TakenOverError("another run"), True),
        (DamagedStoreError("a committed file is missing"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (KeyError("weights"), True),
        (IndexError("positions must be in"), True),
        (TypeError("expected a tensor"), True),
        (AssertionError(), True),
        (OutageError("away for longer than patience"), True),
        (OSError(errno.EIO, "the server is away"), False),
        (RuntimeError("Connection closed by peer"), False),
        (MemoryError(), False),
    ],
)
def test_which_errors_end_a_run(error, final):
    assert is_final(error) == final


def test_a_worker_that_sees_another_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(train_workers, "SEE_OUT_S", 0.3)
    claim = tmp_path / CLAIM
    with pytest.raises(SpecError, match=f"every worker sees, but on .* {tmp_path} is not the"):
        check_visible(tmp_path, "token")
    claim.parent.mkdir()
    claim.write_text("an earlier run's")
    with pytest.raises(SpecError, match="share"):
        check_visible(tmp_path, "token")
    threading.Timer(0.1, claim.write_text, ["token"]).start()  # as a file server that is slow
    check_visible(tmp_path, "token")


def test_a_stop_file_asks_every_worker(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.runs.stop.POLL_S", 0.0)
    ours, theirs = StopRequest(tmp_path), StopRequest(tmp_path)
    assert not theirs()
    ours.ask()
    assert ours()
    assert theirs()
    ours.clear()
    assert not (tmp_path / STOP).exists()
    assert theirs()  # once asked, so it stays
    assert not StopRequest(tmp_path)()


def test_the_first_signal_asks_and_the_second_interrupts(tmp_path):
    request = StopRequest(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with asking_on_signals(request):
        signal.raise_signal(signal.SIGTERM)
        assert request()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
