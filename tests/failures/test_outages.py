"""Fault 16 on commands: an S3 server that refuses everything for a while, in mid-run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.runs.checkpoint import find_resumable
from pipeline.storage.s3 import ObjectStorage
from tests.support.s3_server import put
from tests.support.train_runs import PROBE

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120
TOLD = "has not answered since"


class Command:
    """``ldznet`` in a process of its own, with its output in a file."""

    def __init__(self, folder, *arguments):
        self._log = folder / f"{arguments[0]}-{time.monotonic_ns()}.log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-m", "jobs", *map(str, arguments)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    @property
    def output(self):
        return self._log.read_text()

    def wait_until(self, condition):
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def end(self):
        return self.process.wait(TIMEOUT_S)


@pytest.fixture
def encode(tmp_path, spec, corpus_folder, s3_url, proxy):
    """A function that starts encoding the corpus into a store on S3, with more options."""
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    command = [
        "encode", "--corpus", corpus_folder / "*.tar", "--store", s3_url,
        "--spec", tmp_path / "spec.yaml", "--threads", "1", "--batch", "4",
        "--metrics", tmp_path / "metrics.jsonl",
    ]  # fmt: skip
    return lambda *options: Command(tmp_path, *command, *options)


def count_commits(proxy):
    return sum(method == "PUT" and "/commits/" in path for method, path in list(proxy.requests))


@pytest.mark.parametrize(
    ("actors", "fault"),
    [("0", "throttled"), ("0", "reset"), pytest.param("2", "reset", marks=pytest.mark.slow)],
)
def test_an_outage_in_mid_encode_is_ridden_out(encode, proxy, tmp_path, actors, fault):
    run = encode("--actors", actors)
    run.wait_until(lambda: count_commits(proxy) >= 1)
    rule = proxy.add(fault)
    run.wait_until(lambda: TOLD in run.output)
    assert rule.hits > 0
    proxy.rules.clear()
    assert run.end() == 0, run.output
    assert run.output.count(TOLD) < 4, run.output  # not once a request
    assert "answers again, after" in run.output
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["status"], last["done"], last["tasks"]) == ("done", 3, {"committed": 3})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_of_encode(encode, proxy, number):
    run = encode("--actors", "0")
    run.wait_until(lambda: count_commits(proxy) >= 1)
    proxy.add("throttled")
    run.wait_until(lambda: TOLD in run.output)
    run.process.send_signal(number)
    assert run.end() == 130, run.output
    assert "interrupted. What is committed stays; to go on:" in run.output


def test_a_signal_ends_the_wait_before_a_run_begins(encode, proxy):
    """The command's own requests, in its main thread and in a pool of threads."""
    assert encode("--actors", "0").end() == 0
    proxy.add("throttled", "GET", "/commits/")
    run = encode("--actors", "0")
    run.wait_until(lambda: TOLD in run.output)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130, run.output


def test_an_endpoint_that_is_spelt_wrong_is_told_soon(encode, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    run = encode("--actors", "0")
    assert run.end() == 1
    assert "connection refused" in run.output
    assert "for 10s (tries:" in run.output


def test_a_stop_of_training_in_mid_wait_leaves_a_checkpoint_of_its_last_step(
    tmp_path, store_folder, s3_url, proxy
):
    storage = ObjectStorage(s3_url)
    for path in store_folder.rglob("*"):
        if path.is_file():
            put(storage, path.relative_to(store_folder).as_posix(), path.read_bytes())
    config = PROBE.model_copy(update={"num_steps": 100_000, "checkpoint_every": 100_000})
    config = config.model_copy(update={"validate_every": 100_000, "overlays": False})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    out = tmp_path / "run"
    run = Command(
        *(tmp_path, "train", "--store", s3_url, "--config", tmp_path / "config.yaml"),
        *("--out", out, "--workers", "0"),
    )
    metrics = out / "metrics.jsonl"
    run.wait_until(lambda: metrics.exists() and b'"loss"' in metrics.read_bytes())
    proxy.add("reset")
    run.wait_until(lambda: TOLD in run.output)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 130, run.output
    assert find_resumable(out)[1].step > 0
