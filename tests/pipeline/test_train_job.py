"""The command's side of a training run: who may write, how it is ended, its progress."""

import io
import json
import logging
import shutil
import signal
import threading
import time

import pytest

from pipeline.checkpoint import find_resumable, list_checkpoints
from pipeline.progress import Progress
from pipeline.run_lock import LOCKS, RunHeldError, RunLock
from pipeline.stop_request import STOP
from pipeline.train_job import _Follower, run_train
from pipeline.train_log import METRICS
from tests.failures.train_runs import CONFIG, assert_same_run, fit_here

LONG = CONFIG.model_copy(update={"num_steps": 150, "checkpoint_every": 50, "validate_every": 75})


def train(config, store_folder, out, *, resume=False):
    return run_train(config, str(store_folder), out, num_workers=0, resume=resume)


def when_begun(out, action):
    """Do something once the run has logged a step."""

    def watch():
        while not ((out / METRICS).exists() and b'"loss"' in (out / METRICS).read_bytes()):
            time.sleep(0.01)
        action()

    threading.Thread(target=watch, daemon=True).start()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, store_folder):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    fit_here(LONG, store_folder, out)
    return out


@pytest.mark.parametrize("how", ["signal", "file"])
def test_a_run_that_is_asked_to_end_leaves_a_checkpoint_of_its_last_step(
    tmp_path, store_folder, undisturbed, how
):
    out, main = tmp_path / "run", threading.main_thread().ident
    ask = {
        "signal": lambda: signal.pthread_kill(main, signal.SIGTERM),
        "file": lambda: (out / STOP).touch(),
    }[how]
    when_begun(out, ask)
    with pytest.raises(KeyboardInterrupt):
        train(LONG, store_folder, out)
    assert not (out / STOP).exists()
    _, record = find_resumable(out)
    assert 0 < record.step < LONG.num_steps
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert max(line["step"] for line in lines if "loss" in line and "verb" not in line) == (
        record.step
    )
    assert lines[-1]["status"] == "interrupted"
    assert train(LONG, store_folder, out, resume=True).name == "step-000150"
    assert_same_run(out, undisturbed, LONG)


def test_a_second_run_on_the_same_out_is_refused(tmp_path, store_folder):
    out = tmp_path / "run"
    with RunLock(out, "run"), pytest.raises(RunHeldError, match=f"{out}: another run writes here"):
        train(CONFIG, store_folder, out)
    assert not (out / METRICS).exists()
    train(CONFIG, store_folder, out)  # the other has left


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(tmp_path, store_folder, caplog):
    out = tmp_path / "run"
    (out / LOCKS).mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        train(CONFIG, store_folder, out, resume=True)
    assert "ended before the first checkpoint; training from the start" in caplog.text
    assert find_resumable(out)[1].step == CONFIG.num_steps


def test_a_damaged_newest_checkpoint_costs_its_steps_alone(tmp_path, store_folder, caplog):
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(CONFIG, store_folder, whole)
    shutil.copytree(whole, out, symlinks=True)
    newest = list_checkpoints(out)[-1] / "training.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        train(CONFIG, store_folder, out, resume=True)
    assert "going on from the checkpoint before it" in caplog.text
    assert_same_run(out, whole)


def test_progress_follows_a_log_that_is_taken_back(tmp_path):
    path = tmp_path / METRICS
    progress = Progress(
        "train", total=9, unit="steps", metrics_path=None, stream=io.StringIO(), terminal=False
    )

    def write(steps, mode):
        record = {"loss": 1.0, "pairs_per_s": 1.0, "data_wait": 0.0}
        with path.open(mode) as file:
            file.writelines(json.dumps({"step": step} | record) + "\n" for step in steps)

    with progress:
        follower = _Follower(path, progress)
        follower._read_new()  # there is none yet
        write(range(1, 8), "w")
        follower._read_new()
        assert progress._done == 7
        write(range(1, 4), "w")  # a worker resumed from step 3
        follower._read_new()
        assert progress._done == 3
        write(range(4, 6), "a")
        follower._read_new()
        assert progress._done == 5
