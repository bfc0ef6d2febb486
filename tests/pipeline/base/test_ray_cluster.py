"""Ray, started here: what it hears, where it writes, and what its workers import."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.base.ray_cluster import ray_running

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.thorough


def test_our_own_warnings_are_heard_while_ray_runs_and_after(caplog):
    """pytest's handler is with Ray's logger too, as any application's may be."""
    logger = logging.getLogger("pipeline.base.ray_cluster.test")
    form = caplog.handler.formatter
    with ray_running(num_cpus=1):
        logger.warning("heard while it runs")
        assert "heard while it runs" in caplog.text
    logger.warning("heard after")
    assert "heard after" in caplog.text
    assert caplog.handler.formatter is form
    assert caplog.handler.level == logging.NOTSET


IN_A_WORKER = """
import json
import ray
from pipeline.base.ray_cluster import ray_running

@ray.remote
def look():
    import models, pipeline, yaml
    return [models.__file__, pipeline.__file__, yaml.__name__]

with ray_running(num_cpus=1):
    print(json.dumps(ray.get(look.remote())))
"""


def test_workers_start_and_import_ours_wherever_the_command_stands(tmp_path):
    """With a home that cannot be, and a TMPDIR too long for sockets."""
    temp = tmp_path / ("scratch-of-a-scheduler-" * 4)
    temp.mkdir()
    for name in ("models", "pipeline", "jobs", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('of the current folder')")
    environment = {
        **os.environ,
        "TMPDIR": str(temp),
        "HOME": "/dev/null/none",
        "PYTHONSAFEPATH": "1",
    }
    environment["PYTHONPATH"] = str(ROOT)
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_AUTH_TOKEN"):
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, "-c", IN_A_WORKER],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [
        str(ROOT / "models" / "__init__.py"), str(ROOT / "pipeline" / "__init__.py"), "yaml"
    ]  # fmt: skip


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "[127.0.0.1]:{}"])
def test_an_address_where_no_cluster_answers_is_named_at_once(monkeypatch, address):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = address.format(free.getsockname()[1])  # bound, and nobody listens
        monkeypatch.setenv("RAY_ADDRESS", address)
        with (
            pytest.raises(
                ConnectionError, match=rf"^RAY_ADDRESS: no cluster .*{re.escape(address)}"
            ),
            ray_running(),
        ):
            pytest.fail("it began without a cluster")
