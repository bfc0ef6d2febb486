"""Reads configs for diffusers and transformers off the shapes of a CompVis checkpoint's weights.

What no shape tells (activations, groups of norms, heads) is Stable Diffusion 1.4's. Names are those
of the checkpoint, below the prefix of their model.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.convert.names import ConversionError
from models.ldm.sd14 import SD14_TEXT, SD14_UNET, SD14_VAE

CLIP_HEAD_CHANNELS = 64
"""Channels of an attention head in every published CLIP text encoder."""


def read_unet_config(weights: Mapping[str, Tensor], *, num_heads: int = 8) -> dict[str, Any]:
    """Read the config of a UNet, or of the UNet in a head, for diffusers' UNet2DConditionModel.

    Any number of levels, any width and both kinds of projections are understood (convolutions in
    SD 1, linear layers in SD 2).

    Args:
        weights: by their names below ``model.diffusion_model.``.
        num_heads: attention heads, which are in no shape; 8 in SD 1.x.

    Raises:
        ConversionError: a weight without which the config is unknown is absent or has other
            dimensions; or the heads do not divide a width.
    """
    inputs = {found[1] for name in weights if (found := re.match(r"input_blocks\.(\d+)\.", name))}
    samplers = [number for number in inputs if f"input_blocks.{number}.0.op.weight" in weights]
    # A downsampler ends each level but the last.
    num_layers = min([len(inputs), *map(int, samplers)]) - 1
    levels = [f"input_blocks.{1 + i * (num_layers + 1)}" for i in range(len(samplers) + 1)]
    attends = [any(name.startswith(f"{level}.1.") for name in weights) for level in levels]
    widths = [_shape(weights, f"{level}.0.in_layers.2.weight", "UNet", 4)[0] for level in levels]
    text = _shape(weights, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", "UNet", 2)
    # The middle has the last level's width, and always attends.
    for width, attend in zip(widths, [*attends[:-1], True], strict=True):
        if num_heads < 1 or (attend and width % num_heads):
            raise ConversionError(
                f"UNet: {num_heads} attention heads do not divide its width {width}; give the "
                "number it was trained with by --num-heads (Stable Diffusion 1.x: 8)"
            )
    up = ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)]
    projection = _shape(weights, "middle_block.1.proj_in.weight", "UNet", 2, 4)
    return SD14_UNET | {
        # diffusers' name for the number of heads: https://github.com/huggingface/diffusers/issues/2011
        "attention_head_dim": num_heads,
        "block_out_channels": widths,
        "cross_attention_dim": text[1],
        "down_block_types": [
            "CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends
        ],
        "in_channels": _shape(weights, "input_blocks.0.0.weight", "UNet", 4)[1],
        "layers_per_block": num_layers,
        "out_channels": _shape(weights, "out.2.weight", "UNet", 4)[0],
        "up_block_types": up,
        "use_linear_projection": len(projection) == 2,
    }


def read_vae_config(weights: Mapping[str, Tensor], *, scaling_factor: float) -> dict[str, Any]:
    """Read the config of a VAE, for diffusers' AutoencoderKL.

    Args:
        weights: by their names below ``first_stage_model.``.
        scaling_factor: what latents are multiplied by, which is in no shape.

    Raises:
        ConversionError: a weight that the config needs is missing or has other dimensions.
    """
    num_levels = _count(weights, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight", "VAE")
    return SD14_VAE | {
        "block_out_channels": [
            _shape(weights, f"encoder.down.{level}.block.0.conv1.weight", "VAE", 4)[0]
            for level in range(num_levels)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "in_channels": _shape(weights, "encoder.conv_in.weight", "VAE", 4)[1],
        "latent_channels": _shape(weights, "post_quant_conv.weight", "VAE", 4)[1],
        "layers_per_block": _count(
            weights, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight", "VAE"
        ),
        "out_channels": _shape(weights, "decoder.conv_out.weight", "VAE", 4)[0],
        "scaling_factor": scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
    }


def read_text_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the config of a CLIP text encoder, for transformers' CLIPTextModel.

    It has a head for each 64 channels. The ids of start and end are the vocabulary's last two, as
    in CLIP's tokenizer (49406 and 49407).

    Args:
        weights: by their names below ``text_model.``.

    Raises:
        ConversionError: a weight that the config needs is missing or has other dimensions.
    """
    where = "text encoder"
    vocab_size, width = _shape(weights, "embeddings.token_embedding.weight", where, 2)
    positions = _shape(weights, "embeddings.position_embedding.weight", where, 2)
    return SD14_TEXT | {
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "hidden_size": width,
        "intermediate_size": _shape(weights, "encoder.layers.0.mlp.fc1.weight", where, 2)[0],
        "max_position_embeddings": positions[0],
        "num_attention_heads": max(1, width // CLIP_HEAD_CHANNELS),
        "num_hidden_layers": _count(weights, r"encoder\.layers\.(\d+)\.mlp\.fc1\.weight", where),
        "pad_token_id": 1,
        "projection_dim": width,
        "vocab_size": vocab_size,
    }


def read_scaling_factor(scale: Tensor) -> float:
    """Return a checkpoint's ``scale_factor``, to the seven digits that float32 holds.

    SD 1.x's 0.18215 that was rounded to half precision with the weights is taken for 0.18215.

    Raises:
        ConversionError: it is not one finite number above 0.
    """
    usual = SD14_VAE["scaling_factor"]
    number = float(scale) if scale.numel() == 1 and not scale.is_complex() else math.nan
    if not 0 < number < math.inf:
        raise ConversionError(
            f"scale_factor: expected one finite number above 0, got {scale.tolist()}; Stable "
            f"Diffusion 1.x has {usual}"
        )
    halves = (torch.float16, torch.bfloat16)
    if number in [float(torch.tensor(usual, dtype=dtype)) for dtype in halves]:
        return float(usual)
    return round(number, 7)


def _count(weights: Mapping[str, Tensor], pattern: str, where: str) -> int:
    numbers = {int(found[1]) for name in weights if (found := re.fullmatch(pattern, name))}
    if not numbers or numbers != set(range(len(numbers))):
        raise ConversionError(f"{where}: expected {pattern} numbered from 0, got {sorted(numbers)}")
    return len(numbers)


def _shape(weights: Mapping[str, Tensor], name: str, where: str, *ndims: int) -> tuple[int, ...]:
    if name not in weights:
        raise ConversionError(f"{where}: the checkpoint lacks {name}; is the file whole?")
    if weights[name].ndim not in ndims:
        raise ConversionError(
            f"{where}: {name} must have {' or '.join(map(str, ndims))} dimensions, got shape "
            f"{tuple(weights[name].shape)}"
        )
    return tuple(weights[name].shape)
