"""An epoch of a head from the store beside one that computes its inputs anew, as LD-ZNet's code.

Data flow: a store -> the head's own readers, order and step -> an epoch from the store, batches
read ahead; and the same batches of views, masks and prompts in memory -> VAE, text encoder and UNet
for every pair -> the same step. In turns, in one run.

The peer is favoured where it can be: its images are decoded, cropped and in memory beforehand, and
its UNet ends after the last block that the head reads.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.heads import HEADS
from models.ldm import FeatureEncoder, LatentEncoder
from pipeline.batch import Batch
from pipeline.build_head import build_head
from pipeline.layers import find_model
from pipeline.meter import wait_for_device
from pipeline.reader import PairReader, Source
from pipeline.spec import LayerSpec, SpecError, UniformTimesteps
from pipeline.train_config import TrainConfig
from pipeline.train_data import TrainData, open_readers
from pipeline.train_step import TrainStep

PAPER_TIMESTEPS = (300, 500)
"""LD-ZNet's public code draws t uniformly from [300, 500) for each sample and step."""


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


@dataclass(frozen=True, slots=True)
class Views:
    """A batch before the diffusion model: image (B, H, W, 3) uint8, mask (B, H, W) uint8."""

    image: Tensor
    prompts: tuple[str, ...]
    read: Batch
    num_global: int


class Recompute:
    """What a head reads, from images and prompts: the diffusion model in the training loop."""

    def __init__(
        self, latents: LayerSpec, features: LayerSpec, config: TrainConfig, device: torch.device
    ) -> None:
        spec = latents.latents
        self._inputs = HEADS[config.head.name].inputs
        self._latent_encoder = LatentEncoder.from_pretrained(
            find_model(latents), variant=spec.variant, compute=spec.compute, device=device
        )
        self._feature_encoder = FeatureEncoder.from_pretrained(
            find_model(features),
            blocks=config.head.blocks,
            variant=spec.variant,
            compute=features.features.compute,
            device=device,
        )
        chosen = features.features.timesteps
        self._timesteps = PAPER_TIMESTEPS
        if isinstance(chosen, UniformTimesteps):
            self._timesteps = chosen.low, chosen.high
        self._device = device

    def compute(self, views: Views) -> Batch:
        """Return a batch as the reader would, its features float32."""
        inputs: dict[str, Any] = {}
        if "image" in self._inputs:
            inputs["image"] = views.image
        if "text" in self._inputs or "features" in self._inputs:
            text = self._latent_encoder.encode_text(views.prompts)
        if "text" in self._inputs:
            inputs["text"] = text.tokens
            if text.pooled is not None:
                inputs["text_pooled"] = text.pooled
        if "latent" in self._inputs or "features" in self._inputs:
            mean, _ = self._latent_encoder.encode_image(views.image)
            latent = mean * self._latent_encoder.scaling_factor
        if "latent" in self._inputs:
            inputs["latent"] = latent
        if "features" in self._inputs:
            timestep = torch.randint(*self._timesteps, (len(latent),))
            noise = torch.randn(latent.shape, device=self._device)
            inputs["features"] = self._feature_encoder.encode(
                latent, noise, timestep, text.tokens, text.pooled
            )
        # What was made in inference mode cannot be kept for a gradient; a copy can.
        usable = {
            name: {number: x.clone() for number, x in value.items()}
            if isinstance(value, dict)
            else value.clone()
            for name, value in inputs.items()
        }
        return Batch(usable, views.read.mask, views.read.keys, views.read.phrases)


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
    views = list(read_views(config, source, reader))
    recompute = Recompute(source.latents, features, config, device)
    torch.manual_seed(config.seed)
    head = build_head(config.head, source.latents, features)
    step = TrainStep(config, head, device=device)
    num_steps = len(views)
    _take_recomputed(step, recompute, views[:1])
    _take_stored(step, config, source, reader, num_steps=1)
    found = []
    for _ in range(turns):
        recompute_s = _take_recomputed(step, recompute, views)
        store_s, waited_s = _take_stored(step, config, source, reader, num_steps=num_steps)
        found.append((store_s, recompute_s, recompute_s / store_s, waited_s / store_s))
    store_s, recompute_s, ratio, wait = (statistics.median(x) for x in zip(*found, strict=True))
    return EpochRow(
        config.head.name, reader.num_samples, num_steps, store_s, recompute_s, ratio, wait
    )


def read_views(config: TrainConfig, source: Source, reader: PairReader) -> Iterator[Views]:
    """Yield the batches of the first epoch as images and prompts, in the order of training."""
    data = config.data
    images = PairReader(
        source, tasks=data.train, inputs=frozenset({"image"}), choice=data.train_filter
    )
    template = source.latents.latents.prompts[0]
    order = TrainData(config, source, reader).order
    for step in range(order.steps_an_epoch):
        share = order.split(step)
        (positions,) = share.parts
        samples = order.find(positions, epoch=share.epoch)
        numbers = reader.pick(samples, seed=config.seed, epoch=share.epoch)
        read = images.read(numbers, draws=[0] * len(numbers))
        prompts = tuple(template.format(phrase) for phrase in read.phrases)
        yield Views(read.inputs["image"], prompts, read, share.num_global)


def _take_recomputed(step: TrainStep, recompute: Recompute, views: Sequence[Views]) -> float:
    wait_for_device(step.device)
    start_s = time.perf_counter()
    for number, batch in enumerate(views):
        step.take([recompute.compute(batch)], num_global=batch.num_global, step=number)
    wait_for_device(step.device)
    return time.perf_counter() - start_s


def _take_stored(
    step: TrainStep, config: TrainConfig, source: Source, reader: PairReader, *, num_steps: int
) -> tuple[float, float]:
    """Take an epoch's steps from the store; return its seconds and those spent waiting."""
    data = TrainData(config, source, reader)
    wait_for_device(step.device)
    start_s = time.perf_counter()
    for batches in data.read_steps(0, num_steps):
        step.take(batches.parts, num_global=batches.num_global, step=batches.step)
    wait_for_device(step.device)
    return time.perf_counter() - start_s, data.waited_s
