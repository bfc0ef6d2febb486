"""Forward passes of a UNet: its numbered blocks, their outputs, and the conditions that SDXL adds.

Shape suffixes: B batch, C channels, H/W latent height and width, h/w a block's own height and
width, T text tokens, D text width, P pooled text width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from models.ldm.unet_config import LATENT_DOWNSCALE, NUM_TIME_IDS, read_pooled_width


@dataclass(frozen=True, slots=True)
class Block:
    """One spatial transformer of a UNet.

    ``number`` is its place in forward order, from 1. ``downscale`` is the latent's side over its
    output's side (8 at SD 1.4's block 7). ``num_layers`` is the number of its basic transformer
    blocks: 1 at SD 1 and 2, 2 or 10 at SDXL.
    """

    number: int
    module: str
    channels: int
    downscale: int
    num_layers: int = 1


class _LastBlockReached(Exception):
    """Ends a UNet pass once the last block asked for has run."""


def list_blocks(unet: UNet2DConditionModel) -> tuple[Block, ...]:
    """List a UNet's spatial transformers in forward order: down, middle, up.

    Source of the numbering: LD-ZNet (ICCV 2023), section 3. SD 1 and 2 have 16, SDXL has 11 (in
    down 1 and 2, the middle, up 0 and 1); other UNets are numbered in the same way.
    """
    num_levels = len(unet.down_blocks)
    stages: list[tuple[str, int]] = [(f"down_blocks.{i}", 2**i) for i in range(num_levels)]
    if unet.mid_block is not None:  # distilled UNets may have none
        stages.append(("mid_block", 2 ** (num_levels - 1)))
    stages += [(f"up_blocks.{i}", 2 ** (num_levels - 1 - i)) for i in range(len(unet.up_blocks))]
    found: list[Block] = []
    for prefix, downscale in stages:
        stage = unet.get_submodule(prefix)
        for name, module in stage.named_modules():
            if isinstance(module, Transformer2DModel):
                path, depth = f"{prefix}.{name}", len(module.transformer_blocks)
                found.append(Block(len(found) + 1, path, module.in_channels, downscale, depth))
    return tuple(found)


def select_blocks(unet: UNet2DConditionModel, numbers: Sequence[int]) -> tuple[Block, ...]:
    """Return the blocks with these numbers, in forward order.

    Raises:
        ValueError: a number is not one of the UNet's blocks, or none is asked for.
    """
    blocks = list_blocks(unet)
    unknown = sorted(set(numbers) - {block.number for block in blocks})
    if unknown or not numbers:
        raise ValueError(
            f"blocks must be some of 1 to {len(blocks)} (this UNet's spatial transformers), "
            f"got {list(numbers)}"
        )
    return tuple(block for block in blocks if block.number in set(numbers))


@contextmanager
def hook_blocks(
    unet: UNet2DConditionModel, blocks: Sequence[Block], call: Callable[[int, Any], None]
) -> Iterator[None]:
    """Call with a block's number and its module's output each time it has run, in this context."""
    with ExitStack() as hooks:
        for block in blocks:

            def hook(module: nn.Module, args: Any, output: Any, number: int = block.number) -> None:
                call(number, output)

            hooks.enter_context(unet.get_submodule(block.module).register_forward_hook(hook))
        yield


def compute_features(
    unet: UNet2DConditionModel,
    latent_BCHW: Tensor,
    timestep_B: Tensor,
    text_BTD: Tensor,
    *,
    blocks: Sequence[Block],
    added_conditions: Mapping[str, Tensor] | None = None,
) -> dict[int, Tensor]:
    """Run the UNet up to the last of ``blocks`` and return each block's output (B, C, h, w).

    A feature is the transformer's output, its residual included, before any upsampler. What comes
    after the last block is not computed: at SD 1.4 and blocks 6-10 that is 44 % of the FLOPs. The
    values are those of a full forward pass. ``added_conditions`` are SDXL's, as
    ``build_added_conditions`` returns them.
    """
    features: dict[int, Tensor] = {}
    last = max(block.number for block in blocks)

    def keep(number: int, output: Any) -> None:
        features[number] = output[0]
        if number == last:
            raise _LastBlockReached

    with hook_blocks(unet, blocks, keep):
        try:
            unet(
                latent_BCHW,
                timestep_B,
                encoder_hidden_states=text_BTD,
                added_cond_kwargs=dict(added_conditions) if added_conditions else None,
                return_dict=False,
            )
        except _LastBlockReached:
            return features
    raise AssertionError(f"the UNet ended before block {last} ran")


def build_added_conditions(
    unet_config: Mapping[str, Any], pooled_BP: Tensor | None, latent_BCHW: Tensor
) -> dict[str, Tensor] | None:
    """Return what a UNet takes as ``added_cond_kwargs``, None where it takes nothing.

    For ``addition_embed_type: text_time`` (SDXL) these are ``text_embeds``, the pooled text as
    given, and ``time_ids`` (B, 6) float32 on its device: (H, W, 0, 0, H, W) in pixels of the view,
    8 times the latent's sides. The view counts as an image of its own, neither scaled nor cropped,
    so that a value depends on the spec and the view alone. Source: Podell et al. 2023, section
    2.2; the order is that of diffusers' StableDiffusionXLPipeline._get_add_time_ids.

    Raises:
        ValueError: the pooled text is missing or of another shape, or the UNet takes conditions
            of another kind.
    """
    width = read_pooled_width(unet_config)
    if width is None:
        return None
    expected = (len(latent_BCHW), width)
    if pooled_BP is None or tuple(pooled_BP.shape) != expected:
        got = "none" if pooled_BP is None else str(tuple(pooled_BP.shape))
        raise ValueError(
            f"text_pooled must be {expected}, which this UNet's added conditions read, got {got}; "
            "take text and pooled text from the model, or the latents layer, of this UNet"
        )
    height, width = (LATENT_DOWNSCALE * side for side in latent_BCHW.shape[-2:])
    # Filled on the device: a copy from the host would wait for it in each pass.
    time_ids = torch.zeros((len(pooled_BP), NUM_TIME_IDS), device=pooled_BP.device)
    time_ids[:, 0::4].fill_(height)
    time_ids[:, 1::4].fill_(width)
    return {"text_embeds": pooled_BP, "time_ids": time_ids}


def feature_shape(block: Block, latent_side: tuple[int, int]) -> tuple[int, int, int]:
    """Return (channels, height, width) of a block's feature for a latent of this height and width.

    Each downsampler is a stride-2 convolution with padding 1, so odd sides round up.
    """
    height, width = (-(-side // block.downscale) for side in latent_side)
    return block.channels, height, width
