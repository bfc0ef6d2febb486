"""Lists a UNet's blocks with their storage and compute cost, from its config alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from models.ldm.blocks import feature_shape, list_blocks
from models.ldm.family import read_configs
from models.ldm.files import ModelFilesError
from models.ldm.flops import count_block_flops
from models.ldm.sd14 import SD14_UNET
from models.ldm.unet_config import LATENT_DOWNSCALE
from pipeline.spec.fetch_model import fetch_model

SD14 = "sd14"


@dataclass(frozen=True, slots=True)
class BlockRow:
    """One block's feature, of one row at one view size."""

    block: int
    module: str
    channels: int
    side: int  # height and width
    draw_bytes: int  # of one draw, in float16
    gflop: float  # from the UNet's input to this block's output
    share: float  # of the full forward pass' FLOPs, in (0, 1)


def read_unet_config(model: str) -> dict[str, Any]:
    """Read the UNet's config of a diffusers folder, hub id or URL; ``sd14`` is SD 1.4's, built in.

    Raises:
        ModelFilesError: no such model, its UNet has no config that can be read, or encoding would
            refuse its family.
    """
    if model == SD14:
        return dict(SD14_UNET)
    return read_configs(fetch_model(model), need=("unet",))["unet"]


def build_empty_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Build a UNet without weights, on the meta device.

    Raises:
        ModelFilesError: diffusers builds no UNet of this config.
    """
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(dict(config))
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise ModelFilesError(
            f"unet/config.json: describes no UNet that diffusers builds: {type(error).__name__}: "
            f"{error}; fetch it again"
        ) from error


def list_block_rows(config: Mapping[str, Any], *, size_px: int) -> list[BlockRow]:
    """List a UNet's blocks, in forward order, for views of ``size_px``.

    Raises:
        ValueError: ``size_px`` is not a multiple of 64.
    """
    unet = build_empty_unet(config)
    reached, total = count_block_flops(unet, size_px=size_px)
    side = size_px // LATENT_DOWNSCALE
    rows = []
    for block in list_blocks(unet):
        channels, height, width = feature_shape(block, (side, side))
        rows.append(
            BlockRow(
                block=block.number,
                module=block.module,
                channels=channels,
                side=height,
                draw_bytes=channels * height * width * 2,
                gflop=reached[block.number] / 1e9,
                share=reached[block.number] / total,
            )
        )
    return rows
