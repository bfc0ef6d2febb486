"""Floating point operations of a UNet, in all and up to each block.

Convolutions and matrix products are counted, the two of attention among them; a multiplication and
an addition count as two. Norms, activations, softmax and sums are not, as is usual. Source:
``torch.utils.flop_counter``.
"""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from models.ldm.blocks import build_added_conditions, hook_blocks, list_blocks
from models.ldm.sd14 import NUM_TOKENS
from models.ldm.unet_config import LATENT_DOWNSCALE, read_pooled_width, read_text_width


def count_block_flops(unet: UNet2DConditionModel, *, size_px: int) -> tuple[dict[int, int], int]:
    """Count the FLOPs of one row of 77 tokens.

    Args:
        unet: on the meta device. On a CPU torch runs attention as one operation that its counter
            does not know and takes for 0 FLOPs; on meta it becomes the two matrix products.
        size_px: image side, a multiple of 64.

    Returns:
        Those up to the end of each block, by its number, and those of the full forward pass.

    Raises:
        ValueError: the UNet is on another device, or another size.
    """
    if size_px < 64 or size_px % 64:
        raise ValueError(f"size must be a multiple of 64 px, got {size_px}")
    if unet.device.type != "meta":
        raise ValueError(
            f"UNet: expected on the meta device, got {unet.device}, where torch counts attention "
            "as 0 FLOPs; build it under torch.device('meta')"
        )
    reached: dict[int, int] = {}
    counter = FlopCounterMode(display=False)

    def count(number: int, output: Any) -> None:
        reached[number] = counter.get_total_flops()

    side, pooled_width = size_px // LATENT_DOWNSCALE, read_pooled_width(unet.config)
    with torch.device("meta"):
        latent_BCHW = torch.empty(1, unet.config.in_channels, side, side)
        timestep_B = torch.empty(1)
        text_BTD = torch.empty(1, NUM_TOKENS, read_text_width(unet.config))
        pooled_BP = None if pooled_width is None else torch.empty(1, pooled_width)
    added = build_added_conditions(unet.config, pooled_BP, latent_BCHW)
    with hook_blocks(unet, list_blocks(unet), count), torch.no_grad(), counter:
        unet(latent_BCHW, timestep_B, text_BTD, added_cond_kwargs=added, return_dict=False)
    return reached, counter.get_total_flops()
