"""Small training runs for the tests of training: in this process, on two ranks, and killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from pipeline.base.failpoints import set_failpoints
from pipeline.read.source import open_layers
from pipeline.runs.checkpoint import TRAINING, find_resumable, list_checkpoints
from pipeline.runs.config import HeadConfig, TrainConfig
from pipeline.train.data import Worker
from pipeline.train.fit import fit
from pipeline.train.log import METRICS
from pipeline.train.run import open_run_layers

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CONFIG = TrainConfig(
    head=HeadConfig(name="znet"),
    num_steps=6,
    batch_size=4,
    learning_rate=1e-3,
    log_every=1,
    validate_every=3,
    validation_pairs=4,
    checkpoint_every=3,
    ema_decay=0.5,
    overlays=False,
)
# Of many checkpoints and validations, for runs that are killed.
PROBE = CONFIG.model_copy(
    update={
        "head": HeadConfig(name="probe", blocks=(6,), width=4),
        "num_steps": 14,
        "batch_size": 5,
        "validate_every": 4,
        "trace_pairs": True,
        "overlays": True,
    }
)


def make(config=CONFIG, **changes):
    """A config with other values; ``head`` by its name, ``data`` by what changes of it."""
    if isinstance(changes.get("head"), str):
        changes["head"] = HeadConfig(name=changes["head"])
    if "data" in changes:
        changes["data"] = config.data.model_copy(update=changes["data"])
    return config.model_copy(update=changes)


def fit_here(config, store_folder, out, *, rank=0, num_workers=1, resume=False, **options):
    """Fit without Ray and return the steps made."""
    worker = Worker(rank, num_workers, CPU)
    return fit(config, open_layers(str(store_folder)), out, worker, resume=resume, **options)


def fit_newest(config, store, out, *, rank=0, num_workers=1, failpoints=""):
    """``fit`` from the newest checkpoint, as a worker of either kind calls it."""
    torch.set_num_threads(1)
    set_failpoints(failpoints)
    begun = bool(list_checkpoints(out))
    record = find_resumable(out)[1] if begun else None
    source = open_run_layers(config, str(store), resume_from=record)
    return fit(config, source, out, Worker(rank, num_workers, CPU), resume=begun)


def fit_as_rank(config, store, out, *, rank, num_workers, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=num_workers)
    fit_newest(config, store, out, rank=rank, num_workers=num_workers)
    torch.distributed.destroy_process_group()


def find_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_records(out):
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def losses(out):
    """Step -> loss."""
    return {r["step"]: r["loss"] for r in read_records(out) if "loss" in r and "verb" not in r}


def read_pairs(out, num_workers=1):
    """Step -> the pairs that the workers read, in the order of the global batch."""
    shares = []
    for rank in range(num_workers):
        lines = (out / f"pairs-{rank}.jsonl").read_text().splitlines()
        shares.append({r["step"]: r["pairs"] for r in map(json.loads, lines)})
    found = {}
    for step in shares[0]:
        parts = [share[step] for share in shares]
        num = sum(map(len, parts))
        found[step] = [parts[k % num_workers][k // num_workers] for k in range(num)]
    return found


def read_curves(out):
    """{step: (loss, learning rate, gradient norm)} and {step: validation figures}, each once."""
    records = [record for record in read_records(out) if "verb" not in record]
    steps = [record["step"] for record in records if "loss" in record]
    assert len(steps) == len(set(steps)), "a step was logged twice"
    return (
        {
            r["step"]: (r["loss"], r["learning_rate"], r["grad_norm"])
            for r in records
            if "loss" in r
        },
        {r["step"]: r["validation"] for r in records if "validation" in r},
    )


def read_samples(out):
    """{step: its pairs over all workers}; the last trace of each step counts, of each worker."""
    found = {}
    for path in sorted(out.glob("pairs-*.jsonl")):
        of_worker = {}
        for line in path.read_text().splitlines():
            record = json.loads(line)
            of_worker[record["step"]] = record["pairs"]
        for step, pairs in of_worker.items():
            found.setdefault(step, []).extend(pairs)
    return {step: sorted(pairs) for step, pairs in found.items()}


def assert_each_sample_once(out, config):
    """Every whole epoch has each sample once, and the last, begun one none twice."""
    pairs = read_samples(out)
    assert sorted(pairs) == list(range(1, config.num_steps + 1))
    num = 1 + max(max(step) for step in pairs.values() if step)
    num_steps = -(-num // config.batch_size)
    assert config.num_steps > num_steps, "the run must see an epoch whole"
    for first in range(1, config.num_steps + 1, num_steps):
        last = min(first + num_steps - 1, config.num_steps)
        seen = Counter(pair for step in range(first, last + 1) for pair in pairs[step])
        assert set(seen.values()) == {1}
        if last - first + 1 == num_steps:
            assert len(seen) == num


def assert_same_run(out, expected, config=PROBE):
    """As if undisturbed, to the last bit: the curve, the validations, the weights, the samples."""
    assert read_curves(out) == read_curves(expected)
    assert read_samples(out) == read_samples(expected)
    assert_each_sample_once(out, config)
    (ours, record), (theirs, wanted) = find_resumable(out), find_resumable(expected)
    assert record.step == wanted.step == config.num_steps
    assert (record.loop, record.validation) == (wanted.loop, wanted.validation)
    for name in (TRAINING, "model.safetensors"):
        mine, other = load_file(ours / name), load_file(theirs / name)
        assert all(torch.equal(mine[key], value) for key, value in other.items()), name
    best = [(path / "best").resolve().name for path in (out, expected)]
    assert best[0] == best[1]


def assert_close_curves(out, expected):
    """On another number of workers sums round otherwise."""
    ours, theirs = read_curves(out)[0], read_curves(expected)[0]
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(
        [ours[step][0] for step in sorted(ours)],
        [theirs[step][0] for step in sorted(theirs)],
        rtol=2e-3,
    )


def end_group(process):
    """Kill a process that still runs, with all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


class TrainRun:
    """An ``ldznet train`` in a process of its own, in a session of its own."""

    def __init__(self, config, store, out, *options, address=None):
        self.out = out
        config_path = out.with_suffix(".yaml")
        config_path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self._log = out.with_name(f"{out.name}-{time.monotonic_ns()}.log")
        command = [
            sys.executable, "-m", "jobs", "train", "--store", str(store), "--config",
            str(config_path), "--out", str(out), *options,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        environment.pop("RAY_ADDRESS", None)
        environment["OMP_NUM_THREADS"] = "1"
        if address:
            environment["RAY_ADDRESS"] = address
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        weakref.finalize(self, end_group, self.process)  # a failed test leaves nothing running

    @property
    def output(self):
        return self._log.read_text()

    def count_steps(self):
        """The last step in the log."""
        try:
            return max(read_curves(self.out)[0], default=0)
        except (FileNotFoundError, ValueError):  # torn: it is being written
            return 0

    def wait_for_step(self, step, timeout_s=240):
        deadline = time.monotonic() + timeout_s
        while self.count_steps() < step:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def end(self, timeout_s=300):
        """Wait for the end; return the status."""
        return self.process.wait(timeout_s)
