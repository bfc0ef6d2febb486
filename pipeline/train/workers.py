"""Training on Ray Train: the same loop on every worker, restarted when one of them is lost.

Data flow: the cluster is checked for room -> a group of workers starts -> each checks that it sees
``OUT``, and rank 0 locks it -> ``fit`` from the newest checkpoint, as rank 0 sees it. When a worker
or node is lost, Ray Train ends the group and starts another, which resumes.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import ray.train.torch
import torch
from ray._private.state import state
from ray.exceptions import RayActorError
from ray.train import (
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
)
from ray.train.torch import TorchTrainer

from pipeline.base.outages import PATIENCE, OutageError, watching
from pipeline.base.ray_cluster import NodeSize, count_cores, count_gpus, list_nodes, ray_running
from pipeline.base.yaml import SpecError
from pipeline.read.source import Source
from pipeline.runs.checkpoint import list_checkpoints
from pipeline.runs.checkpoint_writer import TakenOverError
from pipeline.runs.config import TrainConfig
from pipeline.runs.lock import LOCKS, RunLock
from pipeline.runs.stop import StopRequest, asking_on_signals
from pipeline.storage.open import list_asks
from pipeline.store.commit import DamagedStoreError
from pipeline.train.data import Worker
from pipeline.train.fit import fit

logger = logging.getLogger(__name__)

MAX_FAILURES = 10  # restarts of a run's workers; nodes that Ray drains are not counted
MAX_STARTS = 10  # tries, of a minute each, to find room for the workers again
STOP_LIMIT_S = 25.0  # from SIGTERM to the end; schedulers kill after 30 s
OLD_WRITER_S = 120.0  # in which an earlier rank 0, whose driver was killed, must end
SEE_OUT_S = 10.0  # in which a file server must show a worker what the command wrote
CLAIM = f"{LOCKS}/claim"  # under OUT: a token that the command writes for its workers
_FINAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
# Bad input, arithmetic, a bug, a GPU too small for the batch. Not a lack of host memory: another
# process may have taken it.
_FINAL = (
    *(ValueError, ArithmeticError, TakenOverError, DamagedStoreError),
    *(LookupError, TypeError, AssertionError, torch.OutOfMemoryError),
    OutageError,  # it was waited out for as long as was asked for
)


def train_on_ray(
    config: TrainConfig,
    source: Source,
    out: Path,
    *,
    num_workers: int | None,
    max_failures: int,
    request: StopRequest,
) -> None:
    """Train a head on several workers, from ``out``'s newest checkpoint if there is one.

    An error that would come again (``is_final``) ends the run; after any other the workers start
    again, up to ``max_failures`` times.

    Raises:
        ValueError: the cluster has no room for the workers, one of them does not see ``out``, or
            as ``fit``.
        RuntimeError: a worker failed for another reason, too often.
        KeyboardInterrupt: the run was asked to end and did not in ``STOP_LIMIT_S``.
    """
    token = os.urandom(8).hex()
    (out / CLAIM).write_text(token, encoding="utf-8")
    level = "INFO" if logger.isEnabledFor(logging.INFO) else "WARNING"
    with ray_running(), watching(list_asks(source.store.storage)):
        num_gpus = count_gpus()
        size = num_workers or num_gpus or 1
        num_threads = max(1, count_cores() // size)
        resources = {"CPU": float(num_threads)} | ({"GPU": 1.0} if num_gpus else {})
        growing = dict(state.get_max_resources_from_cluster_config() or {})  # as Ray Train asks
        check_room(list_nodes(), size=size, resources=resources, growing=growing)
        trainer = TorchTrainer(
            partial(_train_worker, config, source, out, token, num_threads, PATIENCE.total_s),
            scaling_config=ScalingConfig(
                num_workers=size, use_gpu=num_gpus > 0, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=str(out),
                failure_config=FailureConfig(
                    max_failures=max_failures, controller_failure_limit=MAX_STARTS
                ),
                callbacks=[_EndOnFinalError()],
                logging_config=LoggingConfig(log_level=level),
            ),
        )
        _run_trainer(trainer, request)


def check_room(
    nodes: list[NodeSize],
    *,
    size: int,
    resources: Mapping[str, float],
    growing: Mapping[str, float],
) -> None:
    """Check that a cluster has room for the workers; Ray would wait for it for ever.

    ``growing`` is the size to which an autoscaler may bring the cluster, empty without one.

    Raises:
        ValueError: it has no room.
    """
    cpus, gpus = resources["CPU"], resources.get("GPU", 0.0)
    room = sum(node.count_actors(cpus, gpus) for node in nodes)
    if room >= size or (
        growing and all(growing.get(name, 0) >= size * each for name, each in resources.items())
    ):
        return
    each = f"{cpus:g} CPUs" + (f" and {gpus:g} GPU" if gpus else "")
    raise ValueError(
        f"--workers: expected room for {size} workers with {each} each, but the cluster's "
        f"{len(nodes)} nodes have room for {room}; give --workers {room} or fewer, or add nodes"
    )


class _EndOnFinalError(UserCallback):
    """Ends a run on an error that would come again; called in Ray Train's controller."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for found in worker_exceptions.values():
            error = getattr(found, "_base_exc", found)
            if is_final(error):
                raise error


def is_final(error: BaseException) -> bool:
    """Return whether an error would come again if the workers were restarted."""
    if isinstance(error, _FINAL):
        return True
    return isinstance(error, OSError) and error.errno in _FINAL_ERRNOS


def _run_trainer(trainer: TorchTrainer, request: StopRequest) -> None:
    """Run a trainer to its end, in a thread, because Ray Train handles signals in the main one."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  raised in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    asked_s: float | None = None
    with asking_on_signals(request):
        while thread.is_alive():
            thread.join(0.2)
            if asked_s is None and request():
                asked_s = time.monotonic()
            if asked_s is not None and time.monotonic() - asked_s > STOP_LIMIT_S:
                logger.warning("the workers did not end in %.0f s; leaving them", STOP_LIMIT_S)
                raise KeyboardInterrupt
    if errors:
        raise _explain(errors[0]) from errors[0]


def _explain(error: BaseException) -> BaseException:
    """Return the first worker's failure without Ray's words around it."""
    final = getattr(error, "controller_failure", None)
    if final is not None and is_final(final):
        return final
    if not isinstance(error, TrainingFailedError):
        return error
    failures = list(getattr(error, "worker_failures", {}).values()) or [final or error]
    # When a worker is lost the others fail too, but its loss is the reason.
    lost = [failure for failure in failures if isinstance(failure, RayActorError)]
    reason = str((lost or failures)[0]).strip().rsplit("\n", 1)[-1]
    return RuntimeError(
        f"a training worker failed: {reason}. The last checkpoint stays; go on with --resume, on "
        "as many --workers as there is room for"
    )


def _train_worker(
    config: TrainConfig, source: Source, out: Path, token: str, num_threads: int, patience_s: float
) -> None:
    PATIENCE.total_s, PATIENCE.trusted = patience_s, True  # the command had its answers
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(num_threads)
    worker = Worker(context.get_world_rank(), context.get_world_size(), device)
    check_visible(out, token)
    with ExitStack() as stack:
        if worker.rank == 0:
            stack.enter_context(RunLock(out, "writer", wait_s=OLD_WRITER_S))
        fit(
            config,
            source,
            out,
            worker,
            # Rank 0 decides, once no earlier rank 0 writes, and ``fit`` tells the others.
            resume=worker.rank == 0 and bool(list_checkpoints(out)),
            should_stop=StopRequest(out),
        )


def check_visible(out: Path, token: str) -> None:
    """Check that this worker's ``out`` is the folder into which the command wrote its token.

    Raises:
        SpecError: it is another folder, or this process may not write to it.
    """
    until_s = time.monotonic() + SEE_OUT_S
    claim = out / CLAIM
    while not (claim.is_file() and claim.read_text(encoding="utf-8") == token):
        if time.monotonic() > until_s:
            raise SpecError(
                f"--out: expected a folder that every worker sees, but on {os.uname().nodename} "
                f"{out} is not the command's; give one on a file system that all nodes share"
            )
        time.sleep(0.2)
    if not os.access(out, os.W_OK):
        raise SpecError(f"--out: {out} may not be written to on {os.uname().nodename}")
