"""The documented jobs on a head and the worker that it starts, with the token, as documented."""

import importlib.util
import json
import shlex
import subprocess
import uuid
from pathlib import Path

import pytest
import yaml

from pipeline.store.store import Store
from pipeline.upkeep.verify import verify_store
from tests.support.doc_blocks import list_blocks
from tests.support.ray_head import RayHead, read_small_cluster

ROOT = Path(__file__).parents[2]
# What docs/cluster.md names of a worker's eight cores, and what the workers here have.
ENCODE_CORES = {"--actors": "1", "--threads": "2"}
TRAIN_CORES = {"--entrypoint-num-cpus": "2"}
TRAIN = {"head": {"name": "probe", "width": 8}, "num_steps": 2, "batch_size": 2, "log_every": 1}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp_cors") is None,
        reason="jobs go through the dashboard: pip install 'ray[default]'",
    ),
]


@pytest.fixture(scope="module")
def head():
    """A head that runs no work; workers of two cores come as jobs ask for them."""
    head = RayHead(autoscaling=read_small_cluster())
    try:
        yield head
    finally:
        head.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, spec):
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    (folder / "train.yaml").write_text(yaml.safe_dump(TRAIN))
    return folder


def documented_command(verb):
    """The documented ``ray job submit`` of a verb, as words."""
    blocks = [block.text for block in list_blocks(ROOT / "docs" / "cluster.md")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    (line,) = [
        line for line in lines if "ray job submit" in line and f"python -m jobs {verb} " in line
    ]
    return shlex.split(line, comments=True)


def submit(head, verb, replaced):
    """Submit the documented command with values replaced; return the job's id and its output."""
    words = documented_command(verb)
    for option, value in replaced.items():
        words[words.index(option) + 1] = str(value)
    job = f"{verb}-{uuid.uuid4().hex[:8]}"
    words[3:3] = ["--submission-id", job]
    result = run(head, words)
    assert result.returncode == 0, result.stdout + result.stderr
    return job, result.stdout


def run(head, words):
    environment = {**head.environment, "RAY_API_SERVER_ADDRESS": head.dashboard}
    return subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def encoded(head, folder, corpus_folder):
    store = folder / "store"
    replaced = {
        "--corpus": corpus_folder / "*.tar",
        "--store": store,
        "--spec": folder / "spec.yaml",
        **ENCODE_CORES,
    }
    job, output = submit(head, "encode", replaced)
    return store, job, output


def test_encode_succeeds_and_the_store_is_whole(head, encoded):
    store, job, output = encoded
    assert "succeeded" in output
    status = run(head, ["ray", "job", "status", job])
    assert f"{job}' succeeded" in status.stdout + status.stderr
    checks = verify_store(Store.open(str(store)))
    assert checks
    assert [damage for check in checks for damage in check.damage] == []
    assert len(list(store.glob("features-*/commits/*.json"))) == 3


def test_a_jobs_log_is_readable(head, encoded):
    result = run(head, ["ray", "job", "logs", encoded[1]])
    assert result.returncode == 0, result.stderr
    assert "3 tasks: 0 committed, 3 to encode" in result.stdout


def test_train_succeeds_and_leaves_a_checkpoint(head, folder, encoded):
    out = folder / "run"
    replaced = {
        "--store": encoded[0],
        "--config": folder / "train.yaml",
        "--out": out,
        **TRAIN_CORES,
    }
    _, output = submit(head, "train", replaced)
    assert "succeeded" in output
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any(record.get("step") == TRAIN["num_steps"] for record in records)
    assert list(out.glob("**/*.safetensors"))
