"""The conditions that SDXL's UNet adds to its timestep: pooled text, and a view's size and crop.

Shape suffixes: B batch, C latent channels, h/w latent height and width, P pooled text width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_DEFAULT_TEXT_WIDTH = 1280  # UNet2DConditionModel's cross_attention_dim where a config is silent
NUM_TIME_IDS = 6  # original (height, width), crop (top, left), target (height, width)
LATENT_DOWNSCALE = 8  # a view's side in pixels over its latent's


def build_added_conditions(
    unet_config: Mapping[str, Any], pooled_BP: Tensor | None, latent_BChw: Tensor
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
    width = find_pooled_width(unet_config)
    if width is None:
        return None
    expected = (len(latent_BChw), width)
    if pooled_BP is None or tuple(pooled_BP.shape) != expected:
        got = "none" if pooled_BP is None else str(tuple(pooled_BP.shape))
        raise ValueError(
            f"text_pooled must be {expected}, which this UNet's added conditions read, got {got}; "
            "take text and pooled text from the model, or the latents layer, of this UNet"
        )
    height, width = (LATENT_DOWNSCALE * side for side in latent_BChw.shape[-2:])
    # Filled on the device: a copy from the host would wait for it in each pass.
    time_ids = torch.zeros((len(pooled_BP), NUM_TIME_IDS), device=pooled_BP.device)
    time_ids[:, 0::4].fill_(height)
    time_ids[:, 1::4].fill_(width)
    return {"text_embeds": pooled_BP, "time_ids": time_ids}


def find_pooled_width(unet_config: Mapping[str, Any]) -> int | None:
    """Return the width of the pooled text that a UNet reads (SDXL: 1280), None where it reads none.

    The added embedding's input is the pooled text and one sinusoid for each of six time ids.

    Raises:
        ValueError: the UNet takes added conditions of another kind.
    """
    kind = unet_config.get("addition_embed_type")
    if kind is None:
        return None
    if kind != "text_time":
        raise ValueError(
            f"addition_embed_type must be null (SD 1.x, 2.x) or 'text_time' (SDXL), got {kind!r}"
        )
    names = ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
    total, per_time_id = (unet_config.get(name) for name in names)
    if not isinstance(total, int) or not isinstance(per_time_id, int):
        raise ValueError(
            f"{' and '.join(names)} must be whole numbers, got {total!r} and {per_time_id!r}"
        )
    return total - NUM_TIME_IDS * per_time_id


def find_text_width(unet_config: Mapping[str, Any]) -> int:
    """Return the width of the text that a UNet reads (SD 1: 768), one for all of its stages.

    ``cross_attention_dim`` may list it by stage.

    Raises:
        ValueError: it is no whole number, or the stages differ.
    """
    given = unet_config.get("cross_attention_dim", _DEFAULT_TEXT_WIDTH)
    widths = set(given) if isinstance(given, list | tuple) else {given}
    width = widths.pop() if len(widths) == 1 else None
    if type(width) is not int or width < 1:
        raise ValueError(
            "cross_attention_dim must be one whole number above 0, the same for all stages, got "
            f"{given!r}"
        )
    return width
