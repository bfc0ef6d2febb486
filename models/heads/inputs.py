"""What a new head is told: which inputs the layers hold for it, and the network they come from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from models.ldm.blocks import feature_shape, select_blocks
from models.ldm.unet_config import LATENT_DOWNSCALE, read_pooled_width, read_text_width


@dataclass(frozen=True, slots=True)
class FeatureArray:
    """Features of one place in the network: (draws, channels, height, width) a row."""

    channels: int
    height: int
    width: int
    draws: int  # stored a row; a head reads one of them at a time


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """What a head can read, as the layers hold it."""

    view_px: int  # side of a view, which is a square
    pixels_per_latent: int  # pixels of a view's side that one position of the latent covers
    latent_channels: int
    text_width: int
    pooled_width: int | None  # of ``text_pooled``; None where the LDM has none (SD 1 and 2)
    features: Mapping[int, FeatureArray]  # of the options' blocks, by number, as in a batch

    @property
    def latent_side(self) -> int:
        """Positions of the latent along a view's side."""
        return self.view_px // self.pixels_per_latent


@dataclass(frozen=True, slots=True)
class LDMNetwork:
    """The network of a latent diffusion model: its config now, its weights when asked for.

    ``load`` reads the weights and returns the network; it is None where the head must start from
    fresh weights (``initialise: random``, or options without ``starts_from_ldm``).
    """

    config: Mapping[str, Any]  # JSON-safe, as unet/config.json holds it
    load: Callable[[], nn.Module] | None = None


def describe_inputs(
    unet_config: Mapping[str, Any], blocks: Sequence[int], *, view_px: int, num_draws: int = 1
) -> HeadInputs:
    """Return what layers made with a UNet of this config hold for a head that reads ``blocks``.

    Raises:
        ValueError: a number is not one of the UNet's blocks.
    """
    features = {}
    if blocks:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(dict(unet_config))
        side = view_px // LATENT_DOWNSCALE
        for block in select_blocks(unet, blocks):
            features[block.number] = FeatureArray(*feature_shape(block, (side, side)), num_draws)
    return HeadInputs(
        view_px=view_px,
        pixels_per_latent=LATENT_DOWNSCALE,
        latent_channels=unet_config.get("in_channels", 4),
        text_width=read_text_width(unet_config),
        pooled_width=read_pooled_width(unet_config),
        features=features,
    )
