"""A real S3 server for the tests: SeaweedFS on loopback, in a folder of its own, once a session.

Skips nothing: the server comes with the ``dev`` requirements. Its one user has a secret that no
file, log or error may show.
"""

import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.fault_proxy import FaultProxy

ACCESS_KEY = "ldznet-tests"
SECRET_KEY = "CANARY7f3aSECRETd1e2"  # looked for in stores, logs and errors
BUCKET = "ldznet-tests"
_START_S = 60
_STOP_S = 10
_PORTS = ("master.port", "volume.port", "filer.port", "s3.port")


class S3Server:
    """A SeaweedFS process; ``endpoint`` is what AWS_ENDPOINT_URL takes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "data").mkdir(parents=True)
        users = [
            {
                "name": "tests",
                "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
                "actions": ["Admin", "Read", "Write", "List"],
            },
            # Whom a request without a signature comes from: the fault proxy drops signatures
            # together with conditions.
            {"name": "anonymous", "actions": ["Admin", "Read", "Write", "List"]},
        ]
        (folder / "users.json").write_text(json.dumps({"identities": users}))
        ports = _free_ports(2 * len(_PORTS))
        flags = [f"-{n}={p}" for n, p in zip(_PORTS, ports, strict=False)]
        flags += [f"-{n}.grpc={p}" for n, p in zip(_PORTS, ports[len(_PORTS) :], strict=True)]
        self.port = ports[_PORTS.index("s3.port")]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        command = [
            str(Path(sys.executable).with_name("weed")), "-logtostderr=true", "server",
            f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3",
            f"-s3.config={folder / 'users.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0",
            "-master.telemetry=false", "-master.electionTimeout=1s", "-volume.preStopSeconds=0",
            "-master.volumeSizeLimitMB=64", "-volume.max=100", "-volume.minFreeSpace=1",
            f"-filer.localSocket={folder / 'filer.sock'}", f"-s3.localSocket={folder / 's3.sock'}",
            *flags,
        ]  # fmt: skip
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "S3_", "WEED_"))}
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, env=clean, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until a bucket is made and an object is stored."""
        deadline = time.monotonic() + _START_S
        while not self._ready():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                self.stop()
                log = (self._folder / "log").read_text(errors="replace")[-3000:]
                raise RuntimeError(f"weed did not start: {log}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("PUT", f"/{BUCKET}/ready", body=b"1")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        """End the process, which needs no grace, and remove its folder."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(_STOP_S)


def _free_ports(num):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def point_at(monkeypatch, endpoint):
    """Set the environment's chain to the tests' user at an endpoint, and nothing else of AWS."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in s3_variables(endpoint).items():
        monkeypatch.setenv(name, value)


def s3_variables(endpoint):
    """The environment of ``point_at``, for a process."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """The server, ready to take objects in ``BUCKET``."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    server = S3Server(folder)
    try:
        server.wait()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


_numbers = itertools.count()


@pytest.fixture
def s3_url(s3_server, monkeypatch):
    """The URL of a fresh store on the server, with the environment set to reach it."""
    point_at(monkeypatch, s3_server.endpoint)
    return f"s3://{BUCKET}/store {next(_numbers)}"


@pytest.fixture
def proxy(s3_server, s3_url, monkeypatch):
    """A fault proxy before the server; the environment's endpoint is the proxy."""
    with FaultProxy(s3_server.port) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        yield proxy


def put(storage, path, data):
    """Write an object, by one request where it is small."""
    with storage.open_write(path) as file:
        file.write(data)
