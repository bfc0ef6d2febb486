"""The head in LD-ZNet's published checkpoint, as ours: weights, options and an account of its keys.

The checkpoint is that of a Lightning module: beside the head it holds the VAE, the text encoder,
the frozen LDM that the features come from, and tables of the noise schedule. Each key ends up in
the account: converted, left to another converter, or ignored for a reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from models.convert.check_weights import check_weights, unify_dtype
from models.convert.moving_average import EmaReport, prefer_ema
from models.convert.unet_names import (
    HEAD_LEVEL,
    ConversionError,
    list_some,
    read_unet_config,
    rename_unet,
)
from models.heads.ldznet import LDZNet
from models.heads.znet import ZNet
from models.ldm.blocks import Block, feature_shape, list_blocks
from models.ldm.conditions import LATENT_DOWNSCALE

OTHER_PARTS = {
    "first_stage_model.": "the VAE",
    "cond_stage_model.": "the text encoder",
    "sd_features_stage_model.": "the frozen LDM of the features",
}
"""Prefixes of the checkpoint's other parts, each left to the LDM's converter."""

_SCHEDULE = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
    "lvlb_weights",
}
_RULES = {
    **dict.fromkeys(_SCHEDULE, "noise schedule: the head runs at timestep 0 on the clean latent"),
    "scale_factor": "the latent's scale: part of the LDM, not of the head",
    "model_ema.decay": "how the EMA was kept, no weight",
    "model_ema.num_updates": "how the EMA was kept, no weight",
}
_ADDED = (".attn3.", ".norm_sd.", ".attentionpool2D.")


@dataclass(frozen=True, slots=True)
class ConvertedHead:
    """A head made of a published checkpoint, and where each of its keys went.

    ``head`` is on the CPU, in one dtype, in training mode, and shares the checkpoint's memory where
    that is its dtype. ``ema`` says which weights were taken, ``mixed`` which dtypes the checkpoint
    had where they were several. Every key of the checkpoint is in exactly one of the
    mappings: ``converted`` to a parameter's name in the head, ``left`` to the converter of another
    part (named), or ``ignored`` for a reason.
    """

    head: LDZNet | ZNet
    ema: EmaReport
    converted: Mapping[str, str]
    left: Mapping[str, str]
    ignored: Mapping[str, str]
    mixed: str = ""


def convert_head(
    state: Mapping[str, Tensor],
    *,
    num_heads: int = 8,
    size_px: int | None = None,
    dtype: torch.dtype | None = None,
) -> ConvertedHead:
    """Convert the ``state_dict`` of a published LD-ZNet or ZNet checkpoint.

    It is an LD-ZNet where some block has the added attention, else a ZNet. Which blocks have it,
    and the image side that their attention pools are learned for, come from the weights. The
    weights are the EMA copies where the checkpoint has them, as the published code predicts.

    Args:
        state: the checkpoint's ``state_dict``, key to tensor.
        num_heads: attention heads of the UNet, not in the weights; 8 in SD 1.x.
        size_px: the image side that an LD-ZNet must turn out to be for; None takes what it is.
        dtype: of the head; default the checkpoint's widest.

    Raises:
        ConversionError: a key that is not accounted for, a weight that is missing, of another
            shape or no finite float, heads that do not divide a width, or an image
            side that the blocks do not agree on.
    """
    left, ignored = _account_others(state)
    weights, ema = prefer_ema(state)
    names = rename_unet(weights)
    check_weights({key: state[key] for key in ema.sources.values()})
    config = read_unet_config(weights, num_heads=num_heads)
    # A head's config is that of its LDM's UNet, which predicts noise of the latent's channels.
    config["out_channels"] = config["in_channels"]
    renamed, mixed = unify_dtype({_place(new): weights[name] for name, new in names.items()}, dtype)
    if not any(new.startswith("final.") for new in renamed):
        raise ConversionError(
            "checkpoint: expected a head's weights model.diffusion_model.final.…, got none; a "
            "plain LDM is no head"
        )
    head: LDZNet | ZNet
    with torch.device("meta"):  # no memory or time for weights that are replaced
        if any(part in name for part in _ADDED for name in weights):
            head = LDZNet(unet_config=config, **_read_options(renamed, config, size_px))
        else:
            head = ZNet(unet_config=config)
    try:
        head.load_state_dict(renamed, assign=True)
    except RuntimeError as error:
        raise ConversionError(
            f"checkpoint: expected the weights of {type(head).__name__}, got: {error}"
        ) from error
    converted = {ema.sources[name]: _place(new) for name, new in names.items()}
    for key in state:
        if key not in converted and key not in left and key not in ignored:
            assert key.startswith("model.diffusion_model."), key
            ignored[key] = "raw weight: its EMA copy was taken"
    return ConvertedHead(
        head=head, ema=ema, converted=converted, left=left, ignored=ignored, mixed=mixed
    )


def _place(name: str) -> str:
    """Return a parameter's name in the head."""
    return name if name.startswith(HEAD_LEVEL) else f"unet.{name}"


def _account_others(state: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """Return what is left to other converters and what is ignored, all but the head's own keys."""
    left: dict[str, str] = {}
    ignored: dict[str, str] = {}
    unknown: list[str] = []
    for key in state:
        part = next((prefix for prefix in OTHER_PARTS if key.startswith(prefix)), None)
        if part is not None:
            left[key] = OTHER_PARTS[part]
        elif key in _RULES:
            ignored[key] = _RULES[key]
        elif not key.startswith(("model.diffusion_model.", "model_ema.")):
            unknown.append(key)
    if unknown:
        raise ConversionError(
            f"checkpoint: expected the keys of LD-ZNet's Lightning module, got {list_some(unknown)}"
        )
    return left, ignored


def _read_options(
    renamed: Mapping[str, Tensor], config: Mapping[str, Any], size_px: int | None
) -> dict[str, Any]:
    """Return LDZNet's ``blocks`` and ``size_px``, read off the attention pools."""
    with torch.device("meta"):
        blocks = list_blocks(UNet2DConditionModel.from_config(dict(config)))
    grids = {block: _read_grid(renamed, block) for block in blocks if _has_pool(renamed, block)}
    if not grids:
        raise ConversionError("LD-ZNet: expected an attention pool where there is attn3, got none")
    finest = min(grids, key=lambda block: block.downscale)
    side = grids[finest] * finest.downscale
    wrong = [b for b in grids if feature_shape(b, (side, side))[1:] != (grids[b], grids[b])]
    found = side * LATENT_DOWNSCALE
    if wrong or found % 64:
        sides = {block.number: grids[block] * block.downscale * LATENT_DOWNSCALE for block in grids}
        raise ConversionError(
            "LD-ZNet: expected attention pools learned for one image side, a multiple of 64 px, "
            f"got sides by block {sides}"
        )
    if size_px is not None and size_px != found:
        raise ConversionError(
            f"LD-ZNet: expected attention pools for images of {size_px} px, got {found} px; "
            "pass that as size_px, or none"
        )
    return {"blocks": [block.number for block in grids], "size_px": found}


def _has_pool(renamed: Mapping[str, Tensor], block: Block) -> bool:
    return f"pools.{block.number}.positional_embedding" in renamed


def _read_grid(renamed: Mapping[str, Tensor], block: Block) -> int:
    """Return the side of a pool's square grid: its embedding is (channels, side² + 1)."""
    name = f"pools.{block.number}.positional_embedding"
    num_tokens = renamed[name].shape[-1]
    side = isqrt(max(num_tokens - 1, 0))
    if side == 0 or side**2 + 1 != num_tokens:
        raise ConversionError(
            f"{name}: expected a square grid's tokens and their mean, got {num_tokens} tokens"
        )
    return side
