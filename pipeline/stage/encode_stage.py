"""Encodes and commits what tasks lack, several tasks at once, in one process without Ray.

A task has a thread that sends it through ``lanes`` twice: for its latents, then, from their commit,
for its features. An error fails its task, with the reason in the outcome, and stops no other. Only
errors that are no task's fault (an assertion, a closed stage) are raised to the caller.
"""

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from pipeline.base.node_fault import NodeError
from pipeline.base.outages import PATIENCE, OutageError
from pipeline.stage.device import Device
from pipeline.stage.features import FeaturesEncoding, FeaturesStage
from pipeline.stage.lanes import LaneEntry, Lanes, StageClosedError, TaskEncoding
from pipeline.stage.latents import LatentsEncoding, LatentsStage
from pipeline.stage.node_guard import NodeGuard, find_fault, open_machine
from pipeline.stage.watchdog import Watchdog
from pipeline.stage.work import Cause, EncodeConfig, TaskOutcome, WorkItem
from pipeline.store.commit import Commit, DamagedStoreError, RecordName, read_commit, record_path
from pipeline.store.current import is_of_content
from pipeline.store.records import describe_commit
from pipeline.store.store import Store

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_IN_FLIGHT = 4
"""Items at once that keep the device busy: one each fetched, computed, committed, computed."""
LOAD_LIMIT_S = 2 * 3600.0
"""Longest time to load a model, a download or the wait for another's included."""
_BEAT_S = 20.0


@dataclass(slots=True)
class _Sums:
    """What was done for one item so far."""

    won: bool = True  # the last layer: so of two runs that take a layer each, one counts the task
    num_bytes: int = 0
    busy_s: Counter[str] = field(default_factory=Counter)


class EncodeStage:
    """Encodes work items, several at once; any thread may call it.

    Models are loaded when first needed, and stay. The lanes' threads run while there is work.
    """

    def __init__(self, config: EncodeConfig) -> None:
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self._config = config
        self._watchdog = Watchdog(stall_s=config.stall_s) if config.stall_s else None
        self._closed = threading.Event()
        self._guard = NodeGuard(self._closed.wait)
        self._machine: tuple[Store, Device] | None = None
        PATIENCE.total_s, PATIENCE.trusted = config.patience_s, True  # the command had its answers
        self._latents_stage: LatentsStage | None = None
        self._features_stage: FeaturesStage | None = None
        self._loading = threading.RLock()
        self._opening = threading.Lock()
        self._lanes: Lanes | None = None

    def _watch(self, what: str) -> AbstractContextManager[None]:
        return nullcontext() if self._watchdog is None else self._watchdog.working(what)

    @property
    def _store(self) -> Store:
        return self._open_machine()[0]

    @property
    def device(self) -> Device:
        """The GPU, or the CPU where there is none."""
        return self._open_machine()[1]

    def _open_machine(self) -> tuple[Store, Device]:
        """Open store and device, the first time; what fails is this machine's.

        Not as the stage is made: an actor that cannot start is started again, on the same node.
        """
        with self._loading:
            if self._machine is None:
                with self._watch("start"):  # a store on a dead mount hangs as it is opened
                    self._machine = open_machine(self._config)
            return self._machine

    def _report_progress(self, step: str) -> None:
        if self._watchdog is not None:
            self._watchdog.beat(step)

    def _ask_end(self) -> bool:
        """Keep the watchdog still while an outage is waited out; return whether to wait no more."""
        self._report_progress("outage")
        return self._closed.is_set()

    def submit(self, item: WorkItem) -> Future[TaskOutcome]:
        """Start ``encode`` in a thread of its own, and return its future outcome."""
        future: Future[TaskOutcome] = Future()
        future.set_running_or_notify_cancel()  # it cannot be cancelled

        def run() -> None:
            try:
                future.set_result(self.encode(item))
            except BaseException as error:  # noqa: BLE001  # raised to whoever waits for it
                future.set_exception(error)

        threading.Thread(target=run, name="item", daemon=True).start()
        return future

    def encode(self, item: WorkItem) -> TaskOutcome:
        """Encode and commit what a task lacks.

        ``MAX_IN_FLIGHT`` calls at once keep the device busy; more wait their turn. What another run
        has committed since the item was listed is not encoded again: its status is "lost".

        Raises:
            StageClosedError: the stage is closed, or was while it worked.
            AssertionError: a fault of this code. All other errors are in the outcome.
        """
        started_s, sums = time.monotonic(), _Sums()
        fault: NodeError | None = None
        try:
            if self._closed.is_set():
                raise StageClosedError("the encode stage was closed")
            if refusal := self._guard.admit():
                return self._fail(item, refusal, "node")
            with self._watch(item.task.id), PATIENCE.asking(self._ask_end):
                outcome = self._encode(item, sums)
            self._guard.note_success()
        except (AssertionError, StageClosedError):
            raise
        except Exception as error:
            if self._closed.is_set():
                raise StageClosedError(f"the encode stage was closed, and so: {error}") from error
            fault = find_fault(error, check_device=lambda: self.device.check())
            outage = isinstance(error, OutageError)
            outcome = self._fail(item, error, "node" if fault else "storage" if outage else "task")
        elapsed_s, node = time.monotonic() - started_s, socket.gethostname()
        if fault is not None:
            self._guard.report(fault)
        return replace(outcome, elapsed_s=elapsed_s, busy_s=dict(sums.busy_s), node=node)

    def _fail(self, item: WorkItem, error: Exception, cause: Cause) -> TaskOutcome:
        logger.info("task %s failed: %s", item.task.id, error)
        reason, node = f"{type(error).__name__}: {error}", socket.gethostname()
        return TaskOutcome(item.task.id, "failed", error=reason, cause=cause, node=node)

    def close(self) -> None:
        """Abandon all items in progress and accept no more; what is committed stays."""
        with self._opening:
            self._closed.set()
            lanes = self._lanes
        if lanes is not None:
            lanes.abandon()
        if self._latents_stage is not None:
            self._latents_stage.decoder.kill()
            self._latents_stage.decoder.close()
        if self._features_stage is not None:
            self._features_stage.writers.shutdown(wait=False)
        if self._machine is not None:
            self._machine[0].storage.release()
        if self._watchdog is not None:
            self._watchdog.close()

    def _encode(self, item: WorkItem, sums: _Sums) -> TaskOutcome:
        latents = self._encode_latents(item, sums)
        if (
            self._config.features is not None and latents.status == "stored"
        ):  # else: retired meanwhile
            folder = self._config.features.folder
            generation = self._find_features_generation(item, folder, latents)
            if generation is not None:
                self._encode_features((folder, item.task.id, generation), latents, sums)
        accounting = latents.accounting
        held = accounting if item.latents is None else None  # of what was encoded now
        return TaskOutcome(
            task=item.task.id,
            status="committed" if sums.won else "lost",
            num_pairs=latents.rows["pairs"],
            num_samples=accounting.stored_samples if accounting else 0,
            num_held=held.samples if held else 0,
            num_set_aside=held.set_aside_members if held else 0,
            num_bytes=sums.num_bytes,
            rejects=(held and held.rejects) or {},
            notes=(held and held.notes) or {},
        )

    def _encode_latents(self, item: WorkItem, sums: _Sums) -> Commit:
        """Return the commit of a task's latents, which are encoded now unless they are there."""
        folder, task = self._config.latents.folder, item.task
        if item.latents is not None:
            return self._read(folder, task.id, item.latents)
        place = folder, task.id, item.next_latents
        if not self._is_committed(*place):
            encoding = LatentsEncoding(
                self._load(self.load_latents), item, self._read_previous(item)
            )
            if (latents := self._run("latents", encoding, place, sums)) is not None:
                return latents
        return self._count_existing(place, sums)

    def _find_features_generation(self, item: WorkItem, folder: str, latents: Commit) -> int | None:
        """Return the generation of features to write, None where those that stand are the latents'.

        They stand, and are not, where a repair of the latents could not be held to their content.
        """
        if item.features is None:
            return item.next_features
        if item.latents is not None:
            return None
        there = self._read(folder, item.task.id, item.features)
        agrees = is_of_content(describe_commit(there), describe_commit(latents))
        return None if agrees else item.features + 1

    def _encode_features(self, place: tuple[str, str, int], latents: Commit, sums: _Sums) -> None:
        if not self._is_committed(*place):
            encoding = FeaturesEncoding(
                self._load(self.load_features), latents, generation=place[2]
            )
            if self._run("features", encoding, place, sums) is not None:
                return
        self._count_existing(place, sums)

    def _run(
        self, lane: str, encoding: TaskEncoding, place: tuple[str, str, int], sums: _Sums
    ) -> Commit | None:
        """Run an encoding through its lane; return the commit that the layer has then.

        It returns None after an error where another run has committed the same meanwhile: the task
        is done, and ``gc`` may have caused the error, since it removes the files of those who come
        second.
        """
        ended: Future[LaneEntry] = Future()
        while not self._open_lanes().submit(lane, encoding, ended.set_result):
            pass  # the lanes' last encoding ended between the two calls
        entry = ended.result()
        sums.busy_s.update(entry.busy_s)
        if entry.error is not None:
            if isinstance(entry.error, OSError) and self._is_committed(*place):
                return None
            raise entry.error
        commit: Commit
        commit, result = entry.result
        if result == "lost":
            return self._count_existing(place, sums)
        self._count(commit, sums)
        return commit

    def _open_lanes(self) -> Lanes:
        with self._opening:
            if self._lanes is None or self._lanes.closed:
                if self._closed.is_set():
                    raise StageClosedError("the encode stage was closed")
                self._lanes = Lanes(
                    ("latents", "features"),
                    max_bytes=self._config.queue_bytes,
                    on_progress=self._report_progress,
                )
            return self._lanes

    def _count_existing(self, place: tuple[str, str, int], sums: _Sums) -> Commit:
        """Count and return a commit made since the item was listed, by whichever run.

        It is this run's where a worker of the run made it and died.
        """
        commit = self._read(*place)
        self._count(commit, sums)
        return commit

    def _count(self, commit: Commit, sums: _Sums) -> None:
        """Count the commit that a layer has now: this run's, or another's that came first."""
        sums.won = commit.provenance.get("run") == self._config.run
        sums.num_bytes += commit.num_bytes if sums.won else 0

    def _read(self, folder: str, task: str, generation: int) -> Commit:
        return read_commit(self._store.storage, folder, RecordName(task, generation))

    def _is_committed(self, folder: str, task: str, generation: int) -> bool:
        return self._store.storage.exists(record_path(folder, task, generation))

    def _read_previous(self, item: WorkItem) -> Commit | None:
        """Return the latents' generation before the one to write, None where it cannot be read."""
        if item.next_latents == 0:
            return None
        try:
            return self._read(self._config.latents.folder, item.task.id, item.next_latents - 1)
        except DamagedStoreError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                logger.warning("%s", error)
            return None

    def _load(self, load: Callable[[], T]) -> T:
        """Load a model. Whoever listed the items could, so what fails is this machine's fault."""
        try:
            return load()
        except (AssertionError, OutageError, NodeError):
            raise
        except Exception as error:
            raise NodeError(None, f"{type(error).__name__}: {error}") from error

    def load_latents(self) -> LatentsStage:
        """Return the stage of the latents layer; loads VAE and text encoder the first time."""
        with self._loading, self._beating("load"):
            if self._latents_stage is None:
                self._latents_stage = LatentsStage(
                    self._config, self._store.storage, self.device, self._report_progress
                )
            return self._latents_stage

    def load_features(self) -> FeaturesStage:
        """Return the stage of the features layer; loads the UNet the first time."""
        with self._loading, self._beating("load"):
            if self._features_stage is None:
                self._features_stage = FeaturesStage(self._config, self._store, self.device)
            return self._features_stage

    @contextmanager
    def _beating(self, step: str) -> Iterator[None]:
        """Report progress for a step that itself reports none, for ``LOAD_LIMIT_S`` at most."""
        over = threading.Event()

        def beat() -> None:
            for _ in range(int(LOAD_LIMIT_S / _BEAT_S)):
                self._report_progress(step)
                if over.wait(_BEAT_S):
                    return

        if self._watchdog is not None:
            threading.Thread(target=beat, name="beat", daemon=True).start()
        try:
            yield
        finally:
            over.set()
