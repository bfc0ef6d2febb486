"""The command's side of a training run: who may write, how it is ended, its progress."""

import io
import json
import logging
import multiprocessing
import shutil
import signal
import threading
import time

import pytest

from models.ldm.files import ModelFilesError
from pipeline.base.failpoints import set_failpoints
from pipeline.base.progress import Progress
from pipeline.base.yaml import SpecError
from pipeline.runs import stop as stop_request
from pipeline.runs.checkpoint import find_resumable, list_checkpoints
from pipeline.runs.config import HeadConfig
from pipeline.runs.lock import LOCKS, RunHeldError, RunLock
from pipeline.runs.stop import STOP
from pipeline.train import run as train_job
from pipeline.train.log import METRICS, TrainLog
from pipeline.train.run import _Follower, run_train
from tests.support.train_runs import PROBE, assert_same_run, fit_newest, make, read_curves


@pytest.fixture(autouse=True)
def _failpoints_off():
    yield
    set_failpoints("")


PLAIN = PROBE.model_copy(update={"overlays": False})
LONG = PROBE.model_copy(update={"num_steps": 150, "checkpoint_every": 50, "validate_every": 75})


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
    fit_newest(LONG, store_folder, out)
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


def test_a_run_that_is_stopped_in_its_last_validation_makes_it_on_resume(
    tmp_path, store_folder, monkeypatch
):
    """Killed as its only checkpoint is written again, with the figures, too."""
    config = PROBE.model_copy(update={"keep_checkpoints": 1})
    out, whole = tmp_path / "run", tmp_path / "whole"
    fit_newest(config, store_folder, whole)

    def add_and_stop(log, record):
        add_step(log, record)
        if record.step == config.num_steps:
            (out / STOP).touch()

    add_step = TrainLog.add_step
    with monkeypatch.context() as patch:
        patch.setattr(TrainLog, "add_step", add_and_stop)
        patch.setattr(stop_request, "POLL_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            train(config, store_folder, out)
    assert find_resumable(out)[1].step == config.num_steps
    assert find_resumable(out)[1].loop["unvalidated"]
    killed = multiprocessing.get_context("fork").Process(
        target=fit_newest,
        args=(config, store_folder, out),
        kwargs={"failpoints": "checkpoint.replaced=kill"},
    )
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    train(config, store_folder, out, resume=True)
    assert_same_run(out, whole, config)


def test_a_run_that_waited_for_a_holder_does_not_go_on_with_its_checkpoint(
    tmp_path, store_folder, monkeypatch
):
    out = tmp_path / "run"

    class AfterAnother(RunLock):
        def __enter__(self):
            fit_newest(PROBE, store_folder, out)
            return super().__enter__()

    monkeypatch.setattr(train_job, "RunLock", AfterAnother)
    with pytest.raises(SpecError, match=f"{out}: holds checkpoints of an earlier run; add --resu"):
        train(PROBE, store_folder, out)


def test_a_full_disk_ends_the_run_at_its_next_step(tmp_path, store_folder):
    """Not only when it comes to write another checkpoint."""
    out = tmp_path / "run"
    config = LONG.model_copy(update={"num_steps": 1500, "checkpoint_every": 200, "log_every": 1})
    config = config.model_copy(update={"validate_every": 1500})
    with pytest.raises(OSError, match="no space for the checkpoint"):
        fit_newest(config, store_folder, out, failpoints="checkpoint.opened=full")
    set_failpoints("")
    steps = read_curves(out)[0]
    assert 200 <= max(steps) < 400


def test_a_second_run_on_the_same_out_is_refused(tmp_path, store_folder):
    out = tmp_path / "run"
    with RunLock(out, "run"), pytest.raises(RunHeldError, match=f"{out}: another run writes here"):
        train(PROBE, store_folder, out)
    assert not (out / METRICS).exists()
    train(PROBE, store_folder, out)  # the other has left


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(tmp_path, store_folder, caplog):
    out = tmp_path / "run"
    (out / LOCKS).mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        train(PROBE, store_folder, out, resume=True)
    assert "ended before the first checkpoint; training from the start" in caplog.text
    assert find_resumable(out)[1].step == PROBE.num_steps


def test_resume_of_what_is_no_run_is_said(tmp_path, store_folder):
    with pytest.raises(SpecError, match=f"--resume: {tmp_path}/a is not there; leave --resume out"):
        train(PROBE, store_folder, tmp_path / "a", resume=True)
    with pytest.raises(SpecError, match=f"--resume: {tmp_path} holds no run; leave"):
        train(PROBE, store_folder, tmp_path, resume=True)


def test_a_finished_run_says_so_and_goes_on_with_more_steps(tmp_path, store_folder, caplog):
    """Also without its store; what may not change is refused."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    short = PLAIN.model_copy(update={"num_steps": 8})
    train(short, store_folder, out)
    written = (out / METRICS).read_bytes()
    assert train(short, tmp_path / "gone", out, resume=True) == list_checkpoints(out)[-1]
    assert f"{out}: the run is finished, at step 8; raise num_steps, 8 now, to go on" in caplog.text
    assert (out / METRICS).read_bytes() == written
    with pytest.raises(SpecError, match="seed was 0, is 1"):
        train(short.model_copy(update={"seed": 1}), store_folder, out, resume=True)
    for again in (out / "best", list_checkpoints(out)[-1]):
        with pytest.raises(SpecError, match=f"{again} is itself a checkpoint"):
            train(PLAIN, store_folder, again, resume=True)
    train(PLAIN, store_folder, out, resume=True)
    train(PLAIN, store_folder, whole)
    assert read_curves(out) == read_curves(whole)


WILD = {"learning_rate": 1e30, "clip_norm": 1e30, "checkpoint_every": 1}


def test_a_run_that_diverged_goes_on_from_an_earlier_checkpoint(tmp_path, store_folder):
    """The message names the way, step by step."""
    out = tmp_path / "run"
    short = PLAIN.model_copy(update={"num_steps": 4, "checkpoint_every": 1})
    train(short, store_folder, out)
    wild = PLAIN.model_copy(update=WILD)
    last = out / "checkpoints" / "step-000005"
    way = f"weights of {last} have diverged: remove it to go on from step-000004. Lower lear.* 1e"
    with pytest.raises(FloatingPointError, match=f"step 6: the loss is nan.* The {way[:-5]}"):
        train(wild, store_folder, out, resume=True)
    tame = PLAIN.model_copy(update={"warmup_steps": 3, "clip_norm": 0.5})
    with pytest.raises(FloatingPointError, match=r"warmup_steps .3., which then counts from where"):
        train(tame, store_folder, out, resume=True)  # no rate mends weights that have diverged
    shutil.rmtree(last)
    train(tame, store_folder, out, resume=True)
    assert find_resumable(out)[1].step == PLAIN.num_steps


@pytest.mark.parametrize(
    ("every", "said"),
    [(1, "to go on from the start. Lower"), (100, "There is no checkpoint yet. Lower learn")],
)
def test_a_run_that_diverged_at_its_start_begins_anew(tmp_path, store_folder, every, said):
    out = tmp_path / "run"
    config = PLAIN.model_copy(update=WILD | {"checkpoint_every": every, "validate_every": 100})
    with pytest.raises(FloatingPointError, match=said):
        train(config, store_folder, out)
    for folder in list_checkpoints(out):
        shutil.rmtree(folder)
    train(PLAIN, store_folder, out, resume=True)
    assert find_resumable(out)[1].step == PLAIN.num_steps


def test_a_checkpoint_from_before_the_run_diverged_stays(tmp_path, store_folder):
    out = tmp_path / "run"
    train(PLAIN.model_copy(update={"num_steps": 4}), store_folder, out)
    wild = PLAIN.model_copy(update=WILD | {"checkpoint_every": 100, "validate_every": 100})
    with pytest.raises(
        FloatingPointError,
        match=r"The last checkpoint, step-\d+, is from before that and stays\. Lower .*--resume$",
    ):
        train(wild, store_folder, out, resume=True)
    train(PLAIN, store_folder, out, resume=True)
    assert find_resumable(out)[1].step == PLAIN.num_steps


def test_a_damaged_newest_checkpoint_costs_its_steps_alone(tmp_path, store_folder, caplog):
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(PROBE, store_folder, whole)
    shutil.copytree(whole, out, symlinks=True)
    newest = list_checkpoints(out)[-1] / "training.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        train(PROBE, store_folder, out, resume=True)
    # Files are many GB: the command looks at each once, and its worker.
    assert caplog.text.count("going on from the checkpoint before it") == 2
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


def test_a_model_that_is_gone_is_told_before_a_record_is_read(copied_store, tmp_path, monkeypatch):
    gone = make(head=HeadConfig(name="znet", model=str(tmp_path / "gone")))
    monkeypatch.setattr(train_job, "open_layers", None)
    with pytest.raises(ModelFilesError, match=r"expected a diffusers folder .*/gone"):
        train(gone, copied_store, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (copied_store / "snapshots").exists()
