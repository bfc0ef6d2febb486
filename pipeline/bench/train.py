"""An epoch of a head from the store, and one that computes its inputs anew as LD-ZNet's code does.

Data flow: a store -> the head's own readers, order and step -> an epoch from the store, batches
read ahead; and the same batches as images, masks and prompts in memory -> VAE, text encoder and
UNet for every pair -> the same step. Both take turns in one run.

Where there is a choice it favours the recomputing epoch: its images are decoded, cropped and in
memory beforehand, and its UNet ends after the last block that the head reads.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.base.machine import wait_for_device
from pipeline.base.yaml import SpecError, validate
from pipeline.bench.inputs import prepare_model
from pipeline.bench.recompute import ImageBatch, InputEncoder, read_image_batches
from pipeline.encode.actor_pool import ActorBounds
from pipeline.encode.prepare import prepare_encode
from pipeline.encode.run import run_encode
from pipeline.read.reader import PairReader
from pipeline.read.source import Source
from pipeline.runs.config import TrainConfig
from pipeline.runs.new_head import build_head
from pipeline.scenes.scene import write_corpus
from pipeline.spec.fields import Spec
from pipeline.spec.layer import LayerSpec
from pipeline.train.data import TrainData, open_readers
from pipeline.train.step import HeadTrainer

SCENES_PER_TAR = 32
VALIDATION_SCENES = 2  # a split must not be empty


@dataclass(frozen=True, slots=True)
class EpochRow:
    """One head's epochs: medians over the turns.

    ``data_wait`` is the share of the store's epoch in which the step waited for a batch, ``ratio``
    the recomputing epoch's time over the store's.
    """

    head: str
    pairs: int
    steps: int
    store_s: float
    recompute_s: float
    ratio: float
    data_wait: float


def measure_train(
    config: TrainConfig, source: Source, *, heads: Sequence[str], device: torch.device, turns: int
) -> list[EpochRow]:
    """Measure an epoch of each head both ways, in turns, after a step of each that warms up.

    The store must have features and images. All training views stay in memory: choose a corpus
    that fits.

    Raises:
        SpecError: the store lacks what a head or the peer reads.
    """
    if source.features is None:
        raise SpecError("bench train: expected a store with a features layer, got none")
    rows = []
    for name in heads:
        own = config.model_copy(update={"head": config.head.model_copy(update={"name": name})})
        rows.append(_measure_head(own, source, source.features, device=device, turns=turns))
    return rows


def _measure_head(
    config: TrainConfig, source: Source, features: LayerSpec, *, device: torch.device, turns: int
) -> EpochRow:
    reader, _ = open_readers(config, source, device=device)
    batches = list(read_image_batches(config, source, reader))
    encoder = InputEncoder(source.latents, features, config, device)
    torch.manual_seed(config.seed)
    head = build_head(config.head, source.latents, features)
    trainer = HeadTrainer(config, head, device=device)
    num_steps = len(batches)
    _train_recomputed(trainer, encoder, batches[:1])
    _train_stored(trainer, config, source, reader, num_steps=1)
    found = []
    for _ in range(turns):
        recompute_s = _train_recomputed(trainer, encoder, batches)
        store_s, waited_s = _train_stored(trainer, config, source, reader, num_steps=num_steps)
        found.append((store_s, recompute_s, recompute_s / store_s, waited_s / store_s))
    store_s, recompute_s, ratio, wait = (statistics.median(x) for x in zip(*found, strict=True))
    return EpochRow(
        config.head.name, reader.num_samples, num_steps, store_s, recompute_s, ratio, wait
    )


def _train_recomputed(
    trainer: HeadTrainer, encoder: InputEncoder, batches: Sequence[ImageBatch]
) -> float:
    wait_for_device(trainer.device)
    start_s = time.perf_counter()
    for number, batch in enumerate(batches):
        trainer.train_step([encoder.encode(batch)], num_global=batch.num_global, step=number)
    wait_for_device(trainer.device)
    return time.perf_counter() - start_s


def _train_stored(
    trainer: HeadTrainer, config: TrainConfig, source: Source, reader: PairReader, *, num_steps: int
) -> tuple[float, float]:
    """Take an epoch's steps from the store; return its seconds and those spent waiting."""
    data = TrainData(config, source, reader)
    wait_for_device(trainer.device)
    start_s = time.perf_counter()
    for step in data.read_steps(0, num_steps):
        trainer.train_step(step.passes, num_global=step.num_global, step=step.step)
    wait_for_device(trainer.device)
    return time.perf_counter() - start_s, data.waited_s


def write_train_store(folder: Path, *, num: int, size_px: int) -> str:
    """Encode drawn scenes below ``folder``, return the store's URL; RuntimeError if any fails."""
    for split, count in (("train", num), ("val", VALIDATION_SCENES)):
        write_corpus(
            folder / "corpus",
            split=split,
            num_images=count,
            images_per_tar=SCENES_PER_TAR,
            size_px=size_px,
        )
    model = str(prepare_model(None, folder / "ldm", size_px=size_px))
    latents = {"model": model, "size": size_px, "keep_image": True}
    spec = validate({"latents": latents, "features": {}}, Spec, where="bench train")
    url = str(folder / "store")
    run = prepare_encode(spec, [str(folder / "corpus" / "*.tar")], url, batch=16)
    totals = run_encode(run, metrics_path=None, actors=ActorBounds(0, 0))
    if totals.failures:
        raise RuntimeError(f"bench train: the scenes failed to encode:\n{totals.describe()}")
    return url
