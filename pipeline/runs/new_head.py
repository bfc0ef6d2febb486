"""A new head for a store's layers."""

import hashlib
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from models.heads.head import Head
from models.heads.registry import HEADS
from models.ldm.files import ModelFilesError
from pipeline.runs.config import HeadConfig
from pipeline.spec.fetch_model import fetch_model
from pipeline.spec.layer import LayerSpec
from pipeline.spec.open_model import open_model

_CONFIG = "unet/config.json"


def build_head(config: HeadConfig, latents: LayerSpec, features: LayerSpec | None) -> Head:
    """Build a head for a store's layers, its weights from the LDM's UNet or afresh.

    One made afresh, as every probe is, reads of the LDM the UNet's ``config.json`` alone; the
    gigabytes beside it are not read to compare their digests.

    Raises:
        ModelFilesError: the LDM's files are not there or not those of the layer.
    """
    source = latents.source
    afresh = config.initialise == "random" or config.name == "probe"  # which has no layer of it
    if features is not None and not afresh:
        folder = open_model(features, model=config.model)
    else:
        folder = fetch_model(config.model or source["model"], revision=source["revision"])
        if features is not None:
            _check_config(folder, features)
    options: dict[str, Any] = {}
    if config.name in ("ldznet", "probe"):
        options["blocks"] = config.blocks
    if config.name == "ldznet":
        options |= {"fusion": config.fusion, "size_px": latents.latents.size}
    if config.name == "probe":
        options |= {"width": config.width, "grid": config.grid}
    kind = HEADS[config.name]
    if afresh:
        unet_config = UNet2DConditionModel.load_config(folder, subfolder="unet")
        return kind.from_ldm_config(unet_config, **options)
    unet = UNet2DConditionModel.from_pretrained(
        folder, subfolder="unet", variant=source["variant"], use_safetensors=True
    )
    return kind.from_ldm(unet, **options)


def _check_config(folder: Path, features: LayerSpec) -> None:
    """Hold the UNet's config, and no weights, to a features layer's digest of it."""
    path = folder / _CONFIG
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    if found != features.canonical["weights"][_CONFIG]:
        raise ModelFilesError(
            f"{path}: expected the file that {features.folder} was made with, got "
            f"{'another' if found else 'none'}; name the right folder, or encode a new layer from "
            "this one"
        )
