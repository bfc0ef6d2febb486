"""What the config of a diffusers UNet says of its inputs; imports no torch."""

from collections.abc import Mapping
from typing import Any

LATENT_DOWNSCALE = 8
"""A view's side in pixels over its latent's, of all models that are read."""

NUM_TIME_IDS = 6
"""SDXL's conditions in pixels: original height and width, crop top and left, target likewise."""

_DEFAULT_TEXT_WIDTH = 1280  # UNet2DConditionModel's cross_attention_dim where a config is silent


def read_pooled_width(unet_config: Mapping[str, Any]) -> int | None:
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


def read_text_width(unet_config: Mapping[str, Any]) -> int:
    """Return the width of the text that a UNet reads (SD 1: 768), the same for all of its stages.

    Raises:
        ValueError: ``cross_attention_dim`` is no whole number, or a list of different ones.
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
