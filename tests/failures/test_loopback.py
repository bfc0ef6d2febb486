"""Nobody but this machine reaches a local run, and nobody without the token reaches a cluster."""

import importlib.util
import ipaddress
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from tests.support.ray_head import RayHead, processes_of

ROOT = Path(__file__).parents[2]
CONNECT = "import ray; ray.init(logging_level='ERROR'); print('nodes', len(ray.nodes()))"

needs_dashboard = pytest.mark.skipif(
    importlib.util.find_spec("aiohttp_cors") is None,
    reason="jobs go through the dashboard: pip install 'ray[default]'",
)


@pytest.fixture(scope="module")
def head():
    head = RayHead()
    try:
        yield head
    finally:
        head.close()


def listening(session):
    """The (process name, address) of every TCP socket that a session's processes listen on."""
    found = set()
    for process in processes_of(session):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((process.name(), connection.laddr.ip))
    return found


def is_loopback(ip):
    """Also of an IPv4 address in IPv6's notation, as a socket for both reports it."""
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@pytest.mark.thorough
def test_a_local_run_listens_on_loopback_alone(corpus_folder, spec, tmp_path):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    command = [
        sys.executable, "-m", "jobs", "encode", "--corpus", str(corpus_folder / "*.tar"),
        "--store", str(tmp_path / "store"), "--spec", str(tmp_path / "spec.yaml"),
        "--actors", "1", "--threads", "1", "--limit", "1",
        "--metrics", str(tmp_path / "metrics.jsonl"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for name in ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        environment.pop(name, None)  # what the command does by itself
    seen = set()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            seen |= listening(process.pid)
            time.sleep(0.5)
    finally:
        process.kill()
    assert process.wait() == 0, (tmp_path / "log").read_text()
    names = {name for name, _ in seen}
    assert {"gcs_server", "raylet"} <= names
    assert any("ldznet" in name or "MapWorker" in name for name in names), names
    assert {(name, ip) for name, ip in seen if not is_loopback(ip)} == set()


def test_documentation_and_cluster_turn_token_authentication_on():
    section = (
        (ROOT / "docs" / "cluster.md").read_text().partition("\n## The commands of a run\n")[2]
    )
    assert "RAY_AUTH_MODE=token" in section.partition("\n## ")[0]
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[key] if "ray start" in command]
        assert len(starts) == 1
        before, _, _ = starts[0].partition("ray start")
        assert "RAY_AUTH_MODE=token" in before, key


def connect(head, environment):
    environment = {**environment, "RAY_ADDRESS": head.address}
    return subprocess.run(
        [sys.executable, "-c", CONNECT], env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_driver_without_the_token_is_refused(head):
    result = connect(head, head.environment)
    assert result.returncode == 0, result.stderr
    assert "nodes 1" in result.stdout
    refused = connect(head, head.without_token())
    assert refused.returncode != 0
    assert "nodes" not in refused.stdout
    assert "authentication" in refused.stderr.lower()


@pytest.mark.slow
@needs_dashboard
def test_a_job_submission_without_the_token_is_refused(head):
    def submit(environment):
        return subprocess.run(
            ["ray", "job", "submit", "--address", head.dashboard, "--", "echo", "it", "ran"],
            env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    result = submit(head.environment)
    assert result.returncode == 0, result.stderr
    assert "it ran" in result.stdout
    refused = submit(head.without_token())
    assert refused.returncode != 0
    assert "it ran" not in refused.stdout
    assert "Missing authentication token" in refused.stdout + refused.stderr
