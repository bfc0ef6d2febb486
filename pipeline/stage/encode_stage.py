"""Encodes and commits what tasks lack, several tasks at once, in one process without Ray.

A work item goes through the threads of ``lanes`` for its latents, then, from their commit, for its
features. An error fails its task, with the reason in the outcome, and stops no other. Only errors
that are no task's fault (an assertion, a closed stage) are raised to the caller.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from pipeline.spec.open_model import open_feature_encoder, open_latent_encoder
from pipeline.stage.device import Device
from pipeline.stage.features import FeaturesStage
from pipeline.stage.lanes import LaneEntry, Lanes, StageClosedError, TaskEncoding
from pipeline.stage.latents import LatentsStage
from pipeline.stage.watchdog import Watchdog
from pipeline.stage.work import CommitResult, EncodeConfig, TaskOutcome, WorkItem
from pipeline.store.commit import Commit, DamagedStoreError, RecordName, read_commit, record_path
from pipeline.store.layout import REJECTS
from pipeline.store.store import Store

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 4
"""Items at once that keep the device busy: one each fetched, computed, committed, computed."""
LOAD_LIMIT_S = 2 * 3600.0
"""Longest time to load a model, a download or the wait for another's included."""
_BEAT_S = 20.0
_RAISED = (AssertionError, StageClosedError)


@dataclass(eq=False)
class _ItemState:
    """A work item in progress, and what was done of it so far."""

    item: WorkItem
    future: Future[TaskOutcome] = field(default_factory=Future)
    started_s: float = field(default_factory=time.monotonic)
    latents: Commit | None = None  # that its features are computed from
    all_won: bool = True
    num_bytes: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    busy_s: Counter[str] = field(default_factory=Counter)
    watch: ExitStack = field(default_factory=ExitStack)  # the watchdog's, until its end


class EncodeStage:
    """Encodes work items, several at once; any thread may call it.

    Models are loaded when first needed, and stay. Threads run while there is work.
    """

    def __init__(self, config: EncodeConfig) -> None:
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self._config = config
        self._watchdog = Watchdog(stall_s=config.stall_s) if config.stall_s else None
        with self._watch("start"):  # a store on a dead mount hangs as it is opened
            self._store = Store.open(config.store_url)
            self.device = Device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self._latents_stage: LatentsStage | None = None
        self._features_stage: FeaturesStage | None = None
        self._loading = threading.Lock()
        self._opening = threading.Lock()
        self._lanes: Lanes | None = None
        self._closed = False

    def _watch(self, what: str) -> AbstractContextManager[None]:
        return nullcontext() if self._watchdog is None else self._watchdog.working(what)

    def _report_progress(self, step: str) -> None:
        if self._watchdog is not None:
            self._watchdog.beat(step)

    def encode(self, item: WorkItem) -> TaskOutcome:
        """Encode and commit what a task lacks; never raises for the task's own faults."""
        return self.submit(item).result()

    def submit(self, item: WorkItem) -> Future[TaskOutcome]:
        """Start to encode what a task lacks, and return its future outcome.

        ``MAX_IN_FLIGHT`` items at once keep the device busy; more wait their turn. What another run
        has committed since the item was listed is not encoded again: its status is "lost". The
        future raises what is no fault of the task's, such as StageClosedError.
        """
        state = _ItemState(item)
        state.future.set_running_or_notify_cancel()  # it cannot be cancelled
        if self._closed:
            state.future.set_exception(StageClosedError("the encode stage was closed"))
        elif item.fault:
            outcome = TaskOutcome(task=item.task.id, status="failed", error=item.fault)
            state.future.set_result(outcome)
        else:
            state.watch.enter_context(self._watch(item.task.id))
            self._guard(state, lambda: self._start(state))
        return state.future

    def close(self) -> None:
        """Abandon all items in progress and accept no more; what is committed stays."""
        with self._opening:
            self._closed = True
            lanes = self._lanes
        if lanes is not None:
            lanes.abandon()
        if self._latents_stage is not None:
            self._latents_stage.decoder.kill()
            self._latents_stage.decoder.close()
        if self._features_stage is not None:
            self._features_stage.writers.shutdown(wait=False)
        self._store.storage.release()
        if self._watchdog is not None:
            self._watchdog.close()

    def _start(self, state: _ItemState) -> None:
        item, folder = state.item, self._config.latents.folder
        if item.latents is not None:
            self._start_features(state, item.latents)
        elif self._is_committed(folder, item.task.id, item.next_latents):
            self._start_features(state, item.next_latents)
        else:
            encoding = self.load_latents().begin_task(
                item.task, generation=item.next_latents, sha256=self._find_required_sha256(item)
            )
            self._submit("latents", encoding, state)

    def _start_features(self, state: _ItemState, generation: int) -> None:
        item, layer = state.item, self._config.features
        # Read back even after our own commit: another run's may have won.
        latents = self._read(self._config.latents.folder, item.task.id, generation)
        if state.latents is None and item.latents is None:
            # Committed since the item was listed: by another run, or by a worker of ours that died.
            self._count_existing(state, latents)
            rejects = self._store.read_parquet(latents, REJECTS)
            state.rejects.update(rejects["reason"].to_pylist())
        state.latents = latents
        if layer is None or item.features is not None:
            self._finish(state)
        elif self._is_committed(layer.folder, latents.task, item.next_features):
            self._count_existing(state, self._read(layer.folder, latents.task, item.next_features))
            self._finish(state)
        else:
            encoding = self.load_features().begin_task(latents, generation=item.next_features)
            self._submit("features", encoding, state)

    def _count_existing(self, state: _ItemState, commit: Commit) -> None:
        """Count a commit that is there already: ours where a worker of this run made it."""
        if commit.provenance.get("run") == self._config.run:
            state.num_bytes += commit.num_bytes
        else:
            state.all_won = False

    def _read(self, folder: str, task: str, generation: int) -> Commit:
        return read_commit(self._store.storage, folder, RecordName(task, generation))

    def _is_committed(self, folder: str, task: str, generation: int) -> bool:
        return self._store.storage.exists(record_path(folder, task, generation))

    def _submit(self, lane: str, encoding: TaskEncoding, state: _ItemState) -> None:
        def on_end(entry: LaneEntry) -> None:
            self._guard(state, lambda: self._continue(state, lane, entry))

        while not self._open_lanes().submit(lane, encoding, on_end):
            pass  # the lanes' last encoding ended between the two calls

    def _open_lanes(self) -> Lanes:
        with self._opening:
            if self._lanes is None or self._lanes.closed:
                if self._closed:
                    raise StageClosedError("the encode stage was closed")
                self._lanes = Lanes(
                    ("latents", "features"),
                    max_bytes=self._config.queue_bytes,
                    on_progress=self._report_progress,
                )
            return self._lanes

    def _continue(self, state: _ItemState, lane: str, entry: LaneEntry) -> None:
        """Go on after the end of a layer's encoding, in a thread of its lane."""
        state.busy_s.update(entry.busy_s)
        if entry.error is not None:
            if not self._is_overtaken(state, lane, entry.error):
                raise entry.error
            latents = state.latents
            self._start_features(
                state, state.item.next_latents if latents is None else latents.generation
            )
            return
        result: CommitResult = entry.result
        state.all_won = state.all_won and result.won
        state.num_bytes += result.commit.num_bytes
        if lane == "features":
            self._finish(state)
            return
        state.rejects.update(result.rejects)
        state.latents = result.commit
        self._start_features(state, result.commit.generation)

    def _is_overtaken(self, state: _ItemState, lane: str, error: BaseException) -> bool:
        """Tell whether another run has committed what this encoding failed to commit.

        Then the task is done, whatever the error was: ``gc`` may have removed our files since the
        other commit makes them orphans.
        """
        item, config = state.item, self._config
        layer, generation = config.latents, item.next_latents
        if lane == "features":
            assert config.features is not None, "a features encoding is of that layer"
            layer, generation = config.features, item.next_features
        return isinstance(error, OSError) and self._is_committed(
            layer.folder, item.task.id, generation
        )

    def _finish(self, state: _ItemState) -> None:
        assert state.latents is not None, "it was read"
        accounting = state.latents.accounting
        outcome = TaskOutcome(
            task=state.item.task.id,
            status="committed" if state.all_won else "lost",
            num_pairs=state.latents.rows["pairs"],
            num_samples=accounting.stored_samples if accounting else 0,
            num_bytes=state.num_bytes,
            rejects=dict(state.rejects),
        )
        self._answer(state, outcome)

    def _answer(self, state: _ItemState, outcome: TaskOutcome) -> None:
        elapsed_s = time.monotonic() - state.started_s
        state.watch.close()
        state.future.set_result(replace(outcome, elapsed_s=elapsed_s, busy_s=dict(state.busy_s)))

    def _guard(self, state: _ItemState, step: Callable[[], None]) -> None:
        """Run a step of an item; an error becomes its outcome, or is raised to who waits for it."""
        try:
            step()
        except BaseException as error:  # noqa: BLE001  # in a thread: given to who waits for it
            if self._closed and not isinstance(error, StageClosedError):
                error = StageClosedError(f"the encode stage was closed, and so: {error}")
            if isinstance(error, Exception) and not isinstance(error, _RAISED):
                task = state.item.task.id
                logger.info("task %s failed: %s", task, error)
                reason = f"{type(error).__name__}: {error}"
                self._answer(state, TaskOutcome(task=task, status="failed", error=reason))
                return
            state.watch.close()
            state.future.set_exception(error)

    def _find_required_sha256(self, item: WorkItem) -> str | None:
        """Return the SHA-256 that a tar must have to replace an earlier generation.

        Features of that generation may stand, and belong to its views. None where there is no
        earlier one, or where its record is what is damaged.
        """
        if item.next_latents == 0:
            return None
        try:
            commit = self._read(self._config.latents.folder, item.task.id, item.next_latents - 1)
        except DamagedStoreError as error:
            logger.warning("%s", error)
            return None
        return commit.source.sha256 if commit.source else None

    def load_latents(self) -> LatentsStage:
        """Return the stage of the latents layer; loads VAE and text encoder the first time."""
        with self._loading, self._beating("load"):
            if self._latents_stage is None:
                config, device = self._config, self.device
                encoder = open_latent_encoder(
                    config.latents, device=device.torch_device, tuning=config.tuning
                )
                self._latents_stage = LatentsStage(
                    config,
                    self._store.storage,
                    encoder,
                    device=device,
                    on_progress=self._report_progress,
                )
            return self._latents_stage

    def load_features(self) -> FeaturesStage:
        """Return the stage of the features layer; loads the UNet the first time."""
        config, device = self._config, self.device
        assert config.features is not None, "asked for only where the run has a features layer"
        with self._loading, self._beating("load"):
            if self._features_stage is None:
                encoder = open_feature_encoder(
                    config.features, device=device.torch_device, tuning=config.tuning
                )
                self._features_stage = FeaturesStage(config, self._store, encoder, device=device)
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
