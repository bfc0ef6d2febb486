"""A head's inputs computed from images and prompts in every step, to compare with reading them.

This is the training that needs no store: VAE, text encoder and UNet run for each batch, up to the
last block that the head reads. ``bench train`` and the demo's savings measure it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.heads.registry import find_head_class
from pipeline.read.batch import PairBatch
from pipeline.read.reader import PairReader
from pipeline.read.source import Source
from pipeline.runs.config import TrainConfig
from pipeline.spec.fields import UniformTimesteps
from pipeline.spec.layer import LayerSpec
from pipeline.spec.open_model import open_feature_encoder, open_latent_encoder
from pipeline.train.data import TrainData

PAPER_TIMESTEPS = (300, 500)  # LD-ZNet's code draws t from [300, 500) for each sample and step


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Images (B, H, W, 3) uint8 and prompts of a step's pairs; ``read`` has their masks."""

    image: Tensor
    prompts: tuple[str, ...]
    read: PairBatch
    num_global: int


class InputEncoder:
    """Computes what a head reads with the diffusion model's encoders."""

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

    def encode(self, batch: ImageBatch) -> PairBatch:
        """Return the batch that the store's reader would give; its features are float32."""
        inputs: dict[str, Any] = {}
        if "image" in self._inputs:
            inputs["image"] = batch.image
        if self._inputs & {"text", "features"}:
            text = self._latent_encoder.encode_text(batch.prompts)
        if self._inputs & {"latent", "features"}:
            mean, _ = self._latent_encoder.encode_image(batch.image)
            latent = mean * self._latent_encoder.scaling_factor
        # A head's backward pass cannot keep tensors made in inference mode, but copies of them.
        if "text" in self._inputs:
            inputs["text"] = text.tokens.clone()
            if text.pooled is not None:
                inputs["text_pooled"] = text.pooled.clone()
        if "latent" in self._inputs:
            inputs["latent"] = latent
        if self._feature_encoder is not None:
            timestep = torch.randint(*self._timesteps, (len(latent),))
            noise = torch.randn(latent.shape, device=self._device)
            features = self._feature_encoder.encode_features(
                latent, noise, timestep, text.tokens, text.pooled
            )
            inputs["features"] = {block: value.clone() for block, value in features.items()}
        read = batch.read
        return PairBatch(inputs, read.mask, read.keys, read.phrases, read.ignore)


def read_image_batches(
    config: TrainConfig, source: Source, reader: PairReader
) -> Iterator[ImageBatch]:
    """Yield the training batches of the first epoch, in order, as images and prompts."""
    data = config.data
    images = PairReader(
        source, tasks=data.train, inputs=frozenset({"image"}), choice=data.train_filter
    )
    template = source.latents.latents.prompts[0]
    order = TrainData(config, source, reader).order
    for step in range(order.steps_an_epoch):
        share = order.split(step)
        (positions,) = share.parts
        samples = order.samples_at(positions, epoch=share.epoch)
        numbers = reader.choose_pairs(samples, seed=config.seed, epoch=share.epoch)
        read = images.read(numbers, draws=[0] * len(numbers))
        # An image without any phrase has the empty prompt.
        prompts = tuple(phrase and template.replace("{}", phrase) for phrase in read.phrases)
        yield ImageBatch(read.inputs["image"], prompts, read, share.num_global)
