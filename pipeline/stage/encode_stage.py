"""The encode stage: what is missing of some tasks, committed, layer by layer, never waiting.

A plain class that runs without Ray: ``encode_job`` wraps it in actors. Work items go through the
threads of ``lanes``: first their latents part, then from its commit their features part, while
other items go through the other threads. A task's failure is an outcome with its reason, so that
one bad tar never stops the others.
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

from pipeline.spec.layer import LayerSpec
from pipeline.spec.open_model import open_feature_encoder, open_latent_encoder
from pipeline.stage.device import Device
from pipeline.stage.features import FeaturesStage
from pipeline.stage.lanes import Carried, Lanes, Part, StageClosedError
from pipeline.stage.latents import LatentsStage
from pipeline.stage.watchdog import Watchdog
from pipeline.stage.work import EncodeConfig, Outcome, WorkItem
from pipeline.store.attempt import PartDone
from pipeline.store.commit import Commit, DamagedStoreError, RecordName, read_commit, record_path
from pipeline.store.layout import REJECTS
from pipeline.store.store import Store

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 4
"""Items at once that keep the device at work: one each fetched, computed, committed, computed."""
LOAD_LIMIT_S = 2 * 3600.0
"""Longest load of a model that counts as progress: a download, or the wait for another's."""
_BEAT_S = 20.0
# What no task is to blame for, and is raised: a fault of this code, a stage that was closed.
_RAISED = (AssertionError, StageClosedError)


@dataclass(eq=False)
class _Job:
    """One work item in hand, and what became of it so far."""

    item: WorkItem
    future: Future[Outcome] = field(default_factory=Future)
    started_s: float = field(default_factory=time.monotonic)
    latents: Commit | None = None  # that its features read
    all_won: bool = True
    num_bytes: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    busy_s: dict[str, float] = field(default_factory=dict)
    held: ExitStack = field(default_factory=ExitStack)  # until its end


class EncodeStage:
    """Encodes work items, several at once. Any thread may call it.

    The models are loaded when first needed, and stay; threads run while there is work.
    """

    def __init__(self, config: EncodeConfig) -> None:
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self._config = config
        self._watchdog = Watchdog(stall_s=config.stall_s) if config.stall_s else None
        with self._working("start"):  # a store on a dead mount hangs as it is opened
            self._store = Store.open(config.store_url)
            self.device = Device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self._latents_stage: LatentsStage | None = None
        self._features_stage: FeaturesStage | None = None
        self._loading = threading.Lock()
        self._opening = threading.Lock()
        self._lanes: Lanes | None = None
        self._closed = False

    def _working(self, what: str) -> AbstractContextManager[None]:
        return nullcontext() if self._watchdog is None else self._watchdog.working(what)

    def encode(self, item: WorkItem) -> Outcome:
        """Encode and commit what is missing of one task; never raises for the task's own faults."""
        return self.submit(item).result()

    def submit(self, item: WorkItem) -> Future[Outcome]:
        """Begin with what is missing of one task, and return its outcome to come.

        ``MAX_IN_FLIGHT`` at once keep the device at work; more wait their turn. What another run
        has committed since the item was listed is not encoded again: its status is "lost". The
        future raises what is no fault of the task's, such as StageClosedError.
        """
        job = _Job(item)
        job.future.set_running_or_notify_cancel()  # it cannot be cancelled
        if self._closed:
            job.future.set_exception(StageClosedError("the encode stage was closed"))
        elif item.fault:
            job.future.set_result(Outcome(task=item.task.id, status="failed", error=item.fault))
        else:
            job.held.enter_context(self._working(item.task.id))
            self._guard(job, lambda: self._begin(job))
        return job.future

    def close(self) -> None:
        """Give up what is in hand and take no more work; what is committed stays."""
        with self._opening:
            self._closed = True
            lanes = self._lanes
        if lanes is not None:
            lanes.abandon()
        if self._latents_stage is not None:
            self._latents_stage.decoder.kill()
            self._latents_stage.decoder.close()
        if self._features_stage is not None:
            self._features_stage.hashers.shutdown(wait=False)
        self._store.storage.release()
        if self._watchdog is not None:
            self._watchdog.close()

    def _begin(self, job: _Job) -> None:
        item = job.item
        folder = self._config.latents.folder
        generation = item.latents if item.latents is not None else item.next_latents
        if item.latents is None and not self._is_committed(folder, item.task.id, generation):
            part = self.load_latents().open_part(
                item.task, generation=generation, sha256=self._source_of(item)
            )
            self._carry("latents", part, job)
            return
        self._begin_features(job, generation)

    def _begin_features(self, job: _Job, generation: int) -> None:
        # Read back even after our own commit: a racer's may have won.
        latents = self._read(self._config.latents.folder, job.item.task.id, generation)
        if job.latents is None and job.item.latents is None:
            # Committed since the item was listed: by another run, or by a worker of ours that died.
            self._count_skipped(job, latents)
            job.rejects.update(self._store.read_parquet(latents, REJECTS)["reason"].to_pylist())
        job.latents = latents
        layer = self._config.features
        if layer is None or job.item.features is not None:
            self._end(job)
        elif self._is_committed(layer.folder, latents.task, job.item.next_features):
            features = self._read(layer.folder, latents.task, job.item.next_features)
            self._count_skipped(job, features)
            self._end(job)
        else:
            part = self.load_features(layer).open_part(latents, generation=job.item.next_features)
            self._carry("features", part, job)

    def _count_skipped(self, job: _Job, commit: Commit) -> None:
        """Count a commit that is there already: ours where a worker of this run made it."""
        if commit.provenance.get("run") == self._config.run:
            job.num_bytes += commit.num_bytes
        else:
            job.all_won = False

    def _read(self, folder: str, task: str, generation: int) -> Commit:
        return read_commit(self._store.storage, folder, RecordName(task, generation))

    def _is_committed(self, folder: str, task: str, generation: int) -> bool:
        return self._store.storage.exists(record_path(folder, task, generation))

    def _carry(self, lane: str, part: Part, job: _Job) -> None:
        def done(carried: Carried) -> None:
            self._guard(job, lambda: self._take(job, lane, carried))

        while not self._open_lanes().submit(lane, part, done):
            pass  # their last part ended between the two calls

    def _open_lanes(self) -> Lanes:
        with self._opening:
            if self._lanes is None or self._lanes.closed:
                if self._closed:
                    raise StageClosedError("the encode stage was closed")
                self._lanes = Lanes(
                    ("latents", "features"),
                    max_bytes=self._config.queue_bytes,
                    on_progress=self._beat,
                )
            return self._lanes

    def _beat(self, step: str) -> None:
        if self._watchdog is not None:
            self._watchdog.beat(step)

    def _take(self, job: _Job, lane: str, carried: Carried) -> None:
        """Go on from a part's end, in a thread of its lane."""
        for stage, busy_s in carried.busy_s.items():
            job.busy_s[stage] = job.busy_s.get(stage, 0.0) + busy_s
        if carried.error is not None:
            generation = self._find_overtaken(job, lane, carried.error)
            if generation is None:
                raise carried.error
            self._begin_features(job, generation)
            return
        done: PartDone = carried.result
        job.all_won = job.all_won and done.won
        job.num_bytes += done.commit.num_bytes
        if lane == "features":
            self._end(job)
            return
        job.rejects.update(done.rejects)
        job.latents = done.commit
        self._begin_features(job, done.commit.generation)

    def _find_overtaken(self, job: _Job, lane: str, error: BaseException) -> int | None:
        """Return the generation of the latents to go on from where another run's commit is there.

        Then the error may come of ``gc``, which takes the files of those who are overtaken, and the
        task is done whatever it was. None where no other commit is there.
        """
        item, config = job.item, self._config
        if lane == "latents":
            there = (config.latents.folder, item.next_latents)
        else:
            assert config.features is not None, "a features part is of that layer"
            there = (config.features.folder, item.next_features)
        if not isinstance(error, OSError) or not self._is_committed(
            there[0], item.task.id, there[1]
        ):
            return None
        return item.next_latents if job.latents is None else job.latents.generation

    def _end(self, job: _Job) -> None:
        assert job.latents is not None, "it was read"
        accounting = job.latents.accounting
        outcome = Outcome(
            task=job.item.task.id,
            status="committed" if job.all_won else "lost",
            num_pairs=job.latents.rows["pairs"],
            num_samples=accounting.stored_samples if accounting else 0,
            num_bytes=job.num_bytes,
            rejects=dict(job.rejects),
        )
        self._answer(job, outcome)

    def _answer(self, job: _Job, outcome: Outcome) -> None:
        elapsed_s = time.monotonic() - job.started_s
        job.held.close()
        job.future.set_result(replace(outcome, elapsed_s=elapsed_s, busy_s=dict(job.busy_s)))

    def _guard(self, job: _Job, step: Callable[[], None]) -> None:
        """Run a step of a job. Its error is the job's outcome; what is none of its is raised."""
        try:
            step()
        except BaseException as error:  # noqa: BLE001  # in a thread: raised to who waits for it
            if self._closed and not isinstance(error, StageClosedError):
                error = StageClosedError(f"the encode stage was closed, and so: {error}")
            if isinstance(error, Exception) and not isinstance(error, _RAISED):
                logger.info("task %s failed: %s", job.item.task.id, error)
                reason = f"{type(error).__name__}: {error}"
                self._answer(job, Outcome(task=job.item.task.id, status="failed", error=reason))
                return
            job.held.close()
            job.future.set_exception(error)

    def _source_of(self, item: WorkItem) -> str | None:
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
        """Return what latents parts share; loads VAE and text encoder the first time."""
        with self._loading, self._long_step("load"):
            if self._latents_stage is None:
                layer = self._config.latents
                encoder = open_latent_encoder(
                    layer, device=self.device.torch_device, tuning=self._config.tuning
                )
                self._latents_stage = LatentsStage(
                    self._store.storage,
                    layer,
                    encoder,
                    device=self.device,
                    batch=self._config.batch,
                    num_decoders=self._config.num_decoders,
                    decode_bytes=self._config.queue_bytes,
                    run=self._config.run,
                    on_progress=self._beat,
                )
            return self._latents_stage

    def load_features(self, layer: LayerSpec) -> FeaturesStage:
        """Return what features parts share; loads the UNet the first time."""
        with self._loading, self._long_step("load"):
            if self._features_stage is None:
                encoder = open_feature_encoder(
                    layer, device=self.device.torch_device, tuning=self._config.tuning
                )
                self._features_stage = FeaturesStage(
                    self._store,
                    layer,
                    self._config.latents,
                    encoder,
                    device=self.device,
                    batch=self._config.batch,
                    run=self._config.run,
                )
            return self._features_stage

    @contextmanager
    def _long_step(self, step: str) -> Iterator[None]:
        """Count as progress, for ``LOAD_LIMIT_S``, what says nothing until it is over."""
        over = threading.Event()

        def beat() -> None:
            for _ in range(int(LOAD_LIMIT_S / _BEAT_S)):
                self._beat(step)
                if over.wait(_BEAT_S):
                    return

        if self._watchdog is not None:
            threading.Thread(target=beat, name="beat", daemon=True).start()
        try:
            yield
        finally:
            over.set()
