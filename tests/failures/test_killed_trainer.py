"""Fault 24: the trainer killed, also in mid-checkpoint; and fault 25's other number of workers."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
from safetensors.torch import load_file

from pipeline.base.failpoints import set_failpoints
from pipeline.runs.checkpoint import TRAINING, list_checkpoints, read_record, verify_files
from pipeline.train.log import METRICS
from tests.support.train_runs import (
    PROBE,
    TrainRun,
    assert_close_curves,
    assert_each_sample_once,
    assert_same_run,
    find_port,
    fit_as_rank,
    fit_newest,
    read_samples,
)

pytestmark = pytest.mark.thorough

NUM_KILLS = 20
MOST_STEPS = 20  # before a kill
# Kills come some steps apart, so that a run of this length has room for all, however quick it is.
LONG = PROBE.model_copy(
    update={"num_steps": 500, "checkpoint_every": 10, "validate_every": 40, "log_every": 7}
)
FORK = multiprocessing.get_context("fork")  # no start-up, and a kill is a kill


@pytest.fixture(autouse=True)
def _failpoints_off():
    yield
    set_failpoints("")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, store_folder):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    fit_newest(PROBE, store_folder, out)
    return out


def run_process(function, *arguments, **options):
    process = FORK.Process(target=function, args=arguments, kwargs=options)
    process.start()
    return process


@pytest.mark.parametrize(
    "step",
    [
        "checkpoint.opened@3",
        "checkpoint.written@1",  # there is none to go on from
        "checkpoint.renamed@4",
        "checkpoint.linked@1",
    ],
)
def test_a_kill_in_mid_checkpoint_costs_nothing_but_time(tmp_path, store_folder, undisturbed, step):
    out = tmp_path / "run"
    killed = run_process(fit_newest, PROBE, store_folder, out, failpoints=f"{step}=kill")
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    for path in list_checkpoints(out):
        verify_files(path, read_record(path))
        load_file(path / TRAINING)
    assert fit_newest(PROBE, store_folder, out) == PROBE.num_steps
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_workers_sees_what_was_left(
    tmp_path, store_folder, undisturbed, before, after
):
    out = tmp_path / "run"
    short = PROBE.model_copy(update={"num_steps": 4})
    for config, num in ((short, before), (PROBE, after)):
        port = find_port()
        workers = [
            run_process(
                fit_as_rank, config, store_folder, out, rank=rank, num_workers=num, port=port
            )
            for rank in range(num)
        ]
        for worker in workers:
            worker.join(120)
            assert worker.exitcode == 0
    assert read_samples(out) == read_samples(undisturbed)
    assert_each_sample_once(out, PROBE)
    assert_close_curves(out, undisturbed)


def kill_at_random(draw, run, first):
    """Kill a run, mostly some steps after its first; alone, or with all that it started.

    Where in a step or a checkpoint it falls is chance.
    """
    if draw.random() < 0.15:  # while it starts
        time.sleep(draw.uniform(0, 6))
    else:
        run.wait_for_step(first + draw.randint(1, MOST_STEPS))
        time.sleep(draw.uniform(0, 0.1))
    kill = draw.choice([os.kill, os.killpg])  # alone, its Ray and its workers live on for a while
    kill(run.process.pid, signal.SIGKILL)
    return run.process.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_kill_9_at_random_moments(tmp_path, store_folder, num_workers):
    """20 kills, each followed by --resume: the run of one that nobody disturbed."""
    # On Ray a run goes on for some seconds after its command was killed.
    config = LONG.model_copy(update={"num_steps": 1500}) if num_workers else LONG
    options = "--workers", str(num_workers)
    whole = TrainRun(config, store_folder, tmp_path / "whole", *options)
    assert whole.end(900) == 0, whole.output
    draw, out, log = random.Random(num_workers), tmp_path / "killed", []
    for number in range(NUM_KILLS):
        resume = ["--resume"] if number else []
        run = TrainRun(config, store_folder, out, *options, *resume)
        before = run.count_steps()
        status = kill_at_random(draw, run, before)
        log.append((status, run.count_steps()))
        if num_workers == 0:  # else a worker may live on for a while, and prune what is read here
            for path in list_checkpoints(out):
                verify_files(path, read_record(path))
        if status == 0:
            break
    assert sum(status == -signal.SIGKILL for status, _ in log) == NUM_KILLS, log
    last = TrainRun(config, store_folder, out, *options, "--resume")
    assert last.end(900) == 0, last.output
    assert_same_run(out, whole.out, config)
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert any(line.get("status") == "done" for line in lines)
