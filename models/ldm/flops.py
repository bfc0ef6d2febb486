"""Floating point operations of a UNet, in all and up to each block.

Those of convolutions and matrix products, attention's two among them: a multiplication and an
addition count as two. Norms, activations, softmax and sums are not counted, as is usual. Source:
``torch.utils.flop_counter``.

Shape suffixes: B batch, C channels, H/W latent height and width, T text tokens, D text width,
P pooled text width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.ldm.blocks import list_blocks
from models.ldm.conditions import (
    LATENT_DOWNSCALE,
    build_added_conditions,
    find_pooled_width,
    find_text_width,
)

NUM_TOKENS = 77


def count_flops(unet: UNet2DConditionModel, *, size_px: int, last: int | None = None) -> int:
    """Count the FLOPs of one row of ``size_px`` and 77 tokens, up to the end of block ``last``.

    Without ``last``, of the full forward pass. Arguments and errors as ``count_block_flops``'s.
    """
    blocks, total = count_block_flops(unet, size_px=size_px)
    if last is None:
        return total
    if last not in blocks:
        raise ValueError(f"last must be a block of 1 to {len(blocks)}, got {last}")
    return blocks[last]


def count_block_flops(unet: UNet2DConditionModel, *, size_px: int) -> tuple[dict[int, int], int]:
    """Count the FLOPs of one row: block number to those up to its end, and the full forward's.

    Args:
        unet: on the meta device. On a CPU torch runs attention as one operation that its counter
            does not know and takes for 0 FLOPs; on meta it becomes the two matrix products.
        size_px: image side, a multiple of 64.

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
    with _each_block(unet, lambda n: reached.__setitem__(n, counter.get_total_flops())):
        with torch.no_grad(), counter:
            unet(**_make_inputs(unet, size_px // LATENT_DOWNSCALE))
    return reached, counter.get_total_flops()


@contextmanager
def _each_block(unet: UNet2DConditionModel, call: Any) -> Iterator[None]:
    """Call with a block's number whenever it has run."""
    handles = []
    for block in list_blocks(unet):

        def notice(module: nn.Module, args: Any, output: Any, number: int = block.number) -> None:
            call(number)

        handles.append(unet.get_submodule(block.module).register_forward_hook(notice))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _make_inputs(unet: UNet2DConditionModel, side: int) -> dict[str, Any]:
    config = unet.config
    latent_BCHW = _empty(1, config.in_channels, side, side)
    width = find_pooled_width(config)
    pooled_BP = None if width is None else _empty(1, width)
    return {
        "sample": latent_BCHW,
        "timestep": _empty(1),
        "encoder_hidden_states": _empty(1, NUM_TOKENS, find_text_width(config)),
        "added_cond_kwargs": build_added_conditions(config, pooled_BP, latent_BCHW),
        "return_dict": False,
    }


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
