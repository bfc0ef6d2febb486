"""A head's inputs computed anew for each pair, as without a store, to compare costs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.heads.registry import find_head_class
from pipeline.read.batch import Batch
from pipeline.read.reader import PairReader
from pipeline.read.source import Source
from pipeline.runs.config import TrainConfig
from pipeline.spec.fields import UniformTimesteps
from pipeline.spec.layer import LayerSpec
from pipeline.spec.open_model import open_feature_encoder, open_latent_encoder
from pipeline.train.data import TrainData

PAPER_TIMESTEPS = (300, 500)


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
        self._inputs = find_head_class(config.head.name).reads
        self._latent_encoder = open_latent_encoder(latents, device=device)
        self._feature_encoder = None
        if config.head.blocks:
            self._feature_encoder = open_feature_encoder(
                features, blocks=config.head.blocks, device=device
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
        if self._feature_encoder is not None:
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
