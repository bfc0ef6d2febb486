"""A new head for a store's layers."""

from typing import Any

from diffusers import UNet2DConditionModel

from models.head import Head
from models.heads import HEADS
from pipeline.fetch_model import fetch_model
from pipeline.layers import find_model
from pipeline.spec import LayerSpec
from pipeline.train_config import HeadConfig


def build_head(config: HeadConfig, latents: LayerSpec, features: LayerSpec | None) -> Head:
    """Build a head for a store's layers, its weights from the LDM's UNet or afresh.

    Raises:
        ModelFilesError: the LDM's files are not there or not those of the layer.
    """
    source = latents.source
    if features is not None:
        folder = find_model(features, name=config.model)
    else:
        folder = fetch_model(config.model or source["model"], revision=source["revision"])
    options: dict[str, Any] = {}
    if config.name in ("ldznet", "probe"):
        options["blocks"] = config.blocks
    if config.name == "ldznet":
        options |= {"fusion": config.fusion, "size_px": latents.latents.size}
    if config.name == "probe":
        options["width"] = config.width
    kind = HEADS[config.name]
    if config.initialise == "random" or config.name == "probe":  # a probe has no layer of the LDM
        unet_config = UNet2DConditionModel.load_config(folder, subfolder="unet")
        return kind.from_ldm_config(unet_config, **options)
    unet = UNet2DConditionModel.from_pretrained(
        folder, subfolder="unet", variant=source["variant"], use_safetensors=True
    )
    return kind.from_ldm(unet, **options)
