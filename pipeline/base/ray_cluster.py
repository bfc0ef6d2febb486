"""Connects to Ray at ``RAY_ADDRESS`` or starts a local cluster, and counts its resources."""

import ipaddress
import logging
import os
import re
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.state import actors
from ray.job_config import JobConfig

from pipeline.base.job_copy import JOB_VARIABLE

logger = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 20.0
WATCH_S = 2.0  # between two counts of the actors
MAX_TEMP_BYTES = 38  # of a path under which those of Ray's sockets stay within the system's 107
SPARE_CPUS = 1  # a local cluster offers one CPU more than it has, for Ray's coordinating tasks


@contextmanager
def ray_running(*, num_cpus: int | None = None) -> Iterator[None]:
    """Connect to the cluster at ``RAY_ADDRESS``, or start a local one that ends with the block.

    If Ray is running already, it is used and left alone. ``num_cpus`` is what a local cluster
    offers, by default the cores and ``SPARE_CPUS``. Leaving the block takes at most
    ``SHUTDOWN_TIMEOUT_S``: a local cluster's processes end with this process in any case.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"logging_level": logging.ERROR}
    quiet = not logger.isEnabledFor(logging.INFO)
    # Ray installs a SIGTERM handler, which would end the process without unwinding it.
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main_thread else None
    if address := os.environ.get("RAY_ADDRESS"):
        _check_address(address)
        _connect(**options)
    else:
        _prepare_local()
        if quiet:  # below "fatal" Ray's processes write to this terminal
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        _connect(
            address="local",
            num_cpus=num_cpus or (os.cpu_count() or 1) + SPARE_CPUS,
            include_dashboard=False,
            log_to_driver=not quiet,  # else in Ray's session folder alone
            **options,
        )
        address = ray.util.get_node_ip_address()
        if not ipaddress.ip_address(address).is_loopback:
            logger.warning(
                "Ray listens on %s: set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 before ray is imported",
                address,
            )
    if handler is not None:
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        closing = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
        closing.start()
        closing.join(SHUTDOWN_TIMEOUT_S)
        if closing.is_alive():
            logger.warning("Ray did not shut down in %.0f s; leaving it", SHUTDOWN_TIMEOUT_S)


def _check_address(address: str) -> None:
    """Raise ConnectionError where no server is at an address: Ray itself asks for five minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/\]]+)\]?:(\d+)", address)
    if found is None:  # auto, local, or what Ray refuses
        return
    try:
        socket.create_connection((found[1], int(found[2])), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"RAY_ADDRESS: no cluster answers at {address} ({error}); start it, give another "
            "address, or unset RAY_ADDRESS for a cluster of this machine"
        ) from error


class _OwnImports(JobConfig):
    """A job whose workers do not import from the driver's current folder.

    Ray puts that folder before all others, so that a ``models.py`` there would be taken for ours.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        return True  # Ray then adds neither that folder nor the script's


def _prepare_local() -> None:
    """Give the files and the token of a local cluster a place where the usual one cannot be used.

    The path of ``TMPDIR`` may be too long for sockets, and the home folder may not be writable.
    """
    temp = tempfile.gettempdir()
    os.environ.setdefault(
        "RAY_TMPDIR", temp if len(os.fsencode(temp)) <= MAX_TEMP_BYTES else "/tmp"
    )
    token = Path(os.path.expanduser("~/.ray/auth_token"))
    if not os.environ.get("RAY_AUTH_TOKEN_PATH") and not os.access(token, os.R_OK):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _connect(**options: Any) -> None:
    """Call ``ray.init``, and undo the format that it gives to all handlers of its logger."""
    if JOB_VARIABLE not in os.environ and not os.path.samefile(
        os.curdir, Path(__file__).parents[2]
    ):
        options["job_config"] = _OwnImports()
    formats = [(handler, handler.formatter) for handler in logging.getLogger("ray").handlers]
    ray.init(**options)
    for handler, format_ in formats:
        handler.setFormatter(format_)


@dataclass(frozen=True, slots=True)
class NodeSize:
    """The resources of a node of the cluster."""

    num_cpus: float
    num_gpus: float = 0.0

    def count_actors(self, num_cpus: float, num_gpus: float) -> int:
        """Return how many actors with these resources each the node could hold if empty."""
        asked = [(self.num_cpus, num_cpus), (self.num_gpus, num_gpus)]
        return int(min((there / wanted + 1e-6 for there, wanted in asked if wanted > 0), default=0))


class ActorWatch:
    """Counts the living actors of a Ray Data pool of this driver, every few seconds in a thread.

    The answers are those of the last look: a head that is gone delays nobody. Ray Data's own count
    is of its driver's loop, and says nothing of nodes.
    """

    def __init__(self, on_count: Callable[[int], None]) -> None:
        self._on_count = on_count
        self.nodes: tuple[str, ...] = ()  # where each actor lives: a node's id for each
        self._stop = threading.Event()

    def count(self) -> int:
        """Return how many are alive."""
        return len(self.nodes)

    def __enter__(self) -> "ActorWatch":
        threading.Thread(target=self._run, name="actor-watch", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()

    def _run(self) -> None:
        job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
        while True:
            try:
                found = actors(job_id=job, actor_state_name="ALIVE").values()
            except Exception as error:  # noqa: BLE001  # of any kind, by a cluster that ends
                logger.info("actors cannot be counted: %s", error)
            else:
                self.nodes = tuple(
                    actor["Address"]["NodeID"]
                    for actor in found
                    if actor["ActorClassName"].startswith("MapWorker(")
                )
                self._on_count(len(self.nodes))
            if self._stop.wait(WATCH_S):
                return


def find_node() -> str:
    """Return the id of the cluster's node that this process is on."""
    return str(ray.get_runtime_context().get_node_id())


def list_nodes(leave_out: Collection[str] = ()) -> list[NodeSize]:
    """Return the sizes of the living nodes; this machine's has no more CPUs than cores.

    ``leave_out`` has the ids of nodes that do not count.
    """
    here = find_node()
    sizes = []
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in leave_out:
            num_cpus = node["Resources"].get("CPU", 0)
            if node["NodeID"] == here:
                num_cpus = min(num_cpus, os.cpu_count() or 1)
            sizes.append(NodeSize(num_cpus, node["Resources"].get("GPU", 0)))
    return sizes


def count_cores() -> int:
    """Return the cores of the smallest node that has any, at most this machine's."""
    cores = [node.num_cpus for node in list_nodes() if node.num_cpus >= 1]
    return int(min([*cores, os.cpu_count() or 1]))


def count_gpus() -> int:
    """Return the GPUs that the running cluster has."""
    return int(ray.cluster_resources().get("GPU", 0))
