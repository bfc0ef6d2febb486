"""A Ray cluster on this host as cluster.yaml's is: loopback, token authentication, own home.

The head is a process group's leader of its own session: whatever it starts, autoscaled nodes and
workers of jobs too, ends with it, by process id.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parents[2]
OBJECT_STORE_BYTES = 150 * 2**20
START_TIMEOUT_S = 90
STARTED = "Ray runtime started"
# Ray's names for the head of a cluster whose provider starts nodes on this host.
HEAD_TYPE = "ray.head.default"
HEAD_NODE_ID = "f" * 51 + "00000"
LOCAL_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"

COMMANDS = [
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands",
]  # fmt: skip


class RayHead:
    """A head that runs no work, with an autoscaler where node types are given; close it after."""

    def __init__(self, *, autoscaling: dict | None = None) -> None:
        # Short: the path of a Unix socket below it has at most 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="ldz-"))
        self._sessions: list[int] = []
        home = self._folder / "home"
        (home / ".ray").mkdir(parents=True)
        (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
        port, client, agent, self._dashboard_port = find_free_ports(4)
        self.address = f"127.0.0.1:{port}"
        self.dashboard = f"http://127.0.0.1:{self._dashboard_port}"
        self.environment = {
            **os.environ,
            "HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.environment.pop("RAY_ADDRESS", None)
        arguments = [
            "--head", f"--port={port}", "--num-cpus=0", "--num-gpus=0",
            f"--temp-dir={self._folder}/ray", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._dashboard_port}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}",
        ]  # fmt: skip
        extra = {}
        if autoscaling is not None:
            path = self._folder / "autoscaling.json"
            path.write_text(json.dumps(self._on_this_host(autoscaling)))
            arguments.append(f"--autoscaling-config={path}")
            extra = {
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",  # as `ray up` sets it
                "RAY_CLOUD_INSTANCE_ID": HEAD_NODE_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE_ID,
            }
        try:
            self._start(arguments, extra)
        except BaseException:
            self.close()
            raise

    def without_token(self) -> dict[str, str]:
        """The environment of somebody on this host who does not have the token."""
        (self._folder / "nobody").mkdir(exist_ok=True)
        environment = {**self.environment, "HOME": str(self._folder / "nobody")}
        del environment["RAY_AUTH_MODE"]
        return environment

    def read_log(self, name: str) -> str:
        """Return a log of the session, such as ``monitor.log``."""
        return (self._folder / "ray" / "session_latest" / "logs" / name).read_text()

    def close(self) -> None:
        """End every process that the cluster started, and remove its folder."""
        for session in reversed(self._sessions):
            with suppress(ProcessLookupError):
                os.kill(session, signal.SIGTERM)  # `ray start --block` ends its own
        processes = [p for session in self._sessions for p in processes_of(session)]
        _, alive = psutil.wait_procs(processes, timeout=5)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=10)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, arguments: list[str], extra: dict[str, str]) -> None:
        log = self._folder / f"start-{len(self._sessions)}.log"
        command = ["ray", "start", "--block", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, *arguments], env=self.environment | extra, cwd=self._folder,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self._sessions.append(process.pid)
        for _ in range(START_TIMEOUT_S * 5):
            if STARTED in log.read_text():
                return
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
                break
        raise AssertionError(f"ray start {' '.join(arguments)}: {log.read_text()}")

    def _on_this_host(self, autoscaling: dict) -> dict:
        """The same node types from a provider that starts them as processes of this host."""
        node_types = {
            HEAD_TYPE if name == autoscaling["head_node_type"] else name: {
                **node_type, "node_config": {},
            }
            for name, node_type in autoscaling["available_node_types"].items()
        }  # fmt: skip
        return {
            **{key: [] for key in COMMANDS},  # a process of this host needs no set-up
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "cluster_name": autoscaling["cluster_name"],
            "max_workers": autoscaling["max_workers"],
            "idle_timeout_minutes": autoscaling["idle_timeout_minutes"],
            "available_node_types": node_types,
            "head_node_type": HEAD_TYPE,
            "provider": {
                "type": "external",
                "module": LOCAL_PROVIDER,
                "gcs_address": self.address,
                "head_node_id": HEAD_NODE_ID,
                "launch_multiple": True,
            },
        }


def read_small_cluster() -> dict:
    """Return cluster.yaml with workers of two cores, their GPU a label, that soon go back."""
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    for name, node_type in cluster["available_node_types"].items():
        if name != cluster["head_node_type"]:
            node_type["resources"] = {"CPU": 2, "GPU": 1, "object_store_memory": OBJECT_STORE_BYTES}
    cluster["idle_timeout_minutes"] = 0.1
    return cluster


def find_free_ports(num: int) -> list[int]:
    """Return TCP ports of loopback that nobody listens on now, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(num)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def processes_of(session: int) -> list[psutil.Process]:
    """Return the processes of a session, its leader too, without those that are gone."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
