"""The encode stage: what is missing of a task, committed, layer by layer.

A plain class that runs without Ray: ``encode_job`` wraps it in actors. A task's failure is an
outcome with its reason, so that one bad tar never stops the others.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from models.ldm import FeatureEncoder, LatentEncoder
from models.tuning import PLAIN, Tuning
from pipeline.commit import Commit, DamagedStoreError, RecordName, read_commit
from pipeline.corpus import list_tasks
from pipeline.encode_features import FeaturesStage
from pipeline.encode_latents import LatentsStage
from pipeline.layers import build_layers, find_model
from pipeline.missing import WorkItem, list_missing
from pipeline.spec import LayerSpec, Spec
from pipeline.storage import check_create
from pipeline.store import Store
from pipeline.verify import Damage

logger = logging.getLogger(__name__)

# What fails a task and not the run: damaged and changed tars, a damaged store, values that are not
# finite, input and output, a model that cannot be loaded here, memory (torch's is a RuntimeError).
TASK_ERRORS = (ValueError, RuntimeError, ArithmeticError, OSError, MemoryError)

# Where an item's time goes, in the order in which it passes them; each stage is a thread's or the
# device's own time, so that they overlap and a share over 1 of the wall time is possible.
STAGES = ("fetch", "decode", "vae", "text", "read", "unet", "write", "commit")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one work item, small enough to travel as a Ray row."""

    task: str
    status: Literal["committed", "lost", "failed"]
    num_pairs: int = 0
    num_samples: int = 0
    num_bytes: int = 0  # written by this item, all layers
    elapsed_s: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)  # by stage, of STAGES
    rejects: dict[str, int] = field(default_factory=dict)  # by reason
    error: str = ""


@dataclass(frozen=True, slots=True)
class EncodeConfig:
    """What an encode stage needs: picklable, the same for every actor."""

    store_url: str
    latents: LayerSpec
    features: LayerSpec | None
    batch: int  # views a VAE pass, prompts a text pass, (pair x draw) a UNet pass
    num_threads: int | None = None  # of torch on the CPU; None leaves torch's choice
    tuning: Tuning = PLAIN  # of VAE and UNet


@dataclass(frozen=True, slots=True)
class EncodeRun:
    """What a run will do: its config, the corpus' size, and what is missing."""

    config: EncodeConfig
    num_tasks: int
    items: tuple[WorkItem, ...]

    @property
    def num_done(self) -> int:
        """Tasks that were committed before."""
        return self.num_tasks - len(self.items)

    def describe(self) -> str:
        """Say it in a line a layer and one of counts."""
        layers = [self.config.latents, self.config.features]
        lines = [f"layer {layer.folder}" for layer in layers if layer is not None]
        counts = f"{self.num_tasks} tasks: {self.num_done} committed, {len(self.items)} to encode"
        return "\n".join([*lines, counts])


def prepare_encode(
    spec: Spec,
    patterns: Sequence[str],
    store_url: str,
    *,
    batch: int,
    root: str | None = None,
    limit: int | None = None,
    tuning: Tuning = PLAIN,
    damage: Sequence[Damage] = (),
) -> EncodeRun:
    """Resolve a spec and a corpus against a store: make its layers, list what is missing.

    ``limit`` takes the first tars in URL order only; ``damage`` is what ``verify`` found, to be
    encoded anew.

    Raises:
        SpecError, ModelFilesError, CorpusError: one of the three is not what it must be.
        OSError: the store cannot be written, or is one where a record could have two writers.
    """
    latents, features = build_layers(spec)
    tasks = list_tasks(patterns, root=root)[:limit]
    store = Store.open(store_url)
    items = list_missing(store, latents, features, tasks, damage=damage)
    if items:
        check_create(store.storage)  # before anything is written
    for layer in (latents, features):
        if layer is not None:
            store.add_layer(layer)
    config = EncodeConfig(store.storage.url, latents, features, batch, tuning=tuning)
    return EncodeRun(config, len(tasks), tuple(items))


class EncodeStage:
    """Encodes work items. The models are loaded when first needed, and stay."""

    def __init__(self, config: EncodeConfig) -> None:
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self._config = config
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._store = Store.open(config.store_url)
        self._latents_stage: LatentsStage | None = None
        self._features_stage: FeaturesStage | None = None

    def encode(self, item: WorkItem) -> Outcome:
        """Encode and commit what is missing of one task; never raises for the task's own faults."""
        start = time.monotonic()
        if item.fault:
            return Outcome(task=item.task.id, status="failed", error=item.fault)
        try:
            outcome = self._encode_missing(item)
        except TASK_ERRORS as error:
            logger.warning("task %s failed: %s", item.task.id, error)
            reason = f"{type(error).__name__}: {error}"
            outcome = Outcome(task=item.task.id, status="failed", error=reason)
        return replace(outcome, elapsed_s=time.monotonic() - start)

    def _encode_missing(self, item: WorkItem) -> Outcome:
        folder = self._config.latents.folder
        written: list[Commit] = []
        rejects: Counter[str] = Counter()
        all_won = True
        generation = item.latents
        if generation is None:
            generation = item.next_latents
            commit, rejected, won = self._latents().encode_task(
                item.task, generation=generation, sha256=self._source_of(item)
            )
            rejects.update(str(reject.reason) for reject in rejected)
            all_won = won
            written.append(commit)
        # Read back even after our own commit: a racer's may have won.
        record = RecordName(item.task.id, generation)
        latents = read_commit(self._store.storage, folder, record)
        if self._config.features is not None and item.features is None:
            commit, won = self._features(self._config.features).encode_task(
                latents, generation=item.next_features
            )
            all_won = all_won and won
            written.append(commit)
        accounting = latents.accounting
        return Outcome(
            task=item.task.id,
            status="committed" if all_won else "lost",
            num_pairs=latents.rows["pairs"],
            num_samples=accounting.stored_samples if accounting else 0,
            num_bytes=sum(commit.num_bytes for commit in written),
            rejects=dict(rejects),
        )

    def _source_of(self, item: WorkItem) -> str | None:
        """Return the SHA-256 that a tar must have to replace an earlier generation.

        Features of that generation may stand, and belong to its views. None where there is no
        earlier one, or where its record is what is damaged.
        """
        if item.next_latents == 0:
            return None
        earlier = RecordName(item.task.id, item.next_latents - 1)
        try:
            commit = read_commit(self._store.storage, self._config.latents.folder, earlier)
        except DamagedStoreError as error:
            logger.warning("%s", error)
            return None
        return commit.source.sha256 if commit.source else None

    def _latents(self) -> LatentsStage:
        if self._latents_stage is None:
            layer, spec = self._config.latents, self._config.latents.latents
            encoder = LatentEncoder.from_pretrained(
                find_model(layer),
                variant=spec.variant,
                compute=spec.compute,
                zero_empty_prompt=layer.zero_empty_prompt,
                device=self._device,
                tuning=self._config.tuning,
            )
            self._latents_stage = LatentsStage(
                self._store.storage, layer, encoder, batch=self._config.batch
            )
        return self._latents_stage

    def _features(self, layer: LayerSpec) -> FeaturesStage:
        if self._features_stage is None:
            encoder = FeatureEncoder.from_pretrained(
                find_model(layer),
                blocks=layer.features.blocks,
                variant=layer.source["variant"],
                compute=layer.features.compute,
                device=self._device,
                tuning=self._config.tuning,
            )
            self._features_stage = FeaturesStage(
                self._store, layer, self._config.latents, encoder, batch=self._config.batch
            )
        return self._features_stage
