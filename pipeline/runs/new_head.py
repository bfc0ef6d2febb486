"""A new head for a store's layers."""

import hashlib
from pathlib import Path

from diffusers import UNet2DConditionModel

from models.heads.head import Head
from models.heads.inputs import LDMNetwork, describe_inputs
from models.heads.registry import find_head_class
from models.ldm.family import read_config
from models.ldm.files import ModelFilesError
from pipeline.runs.config import HeadConfig
from pipeline.spec.layer import LayerSpec
from pipeline.spec.open_model import find_model, open_model

_CONFIG = "unet/config.json"


def build_head(config: HeadConfig, latents: LayerSpec, features: LayerSpec | None) -> Head:
    """Build a head for a store's layers, its weights from the LDM's UNet or afresh.

    A head of fresh weights needs of the LDM the UNet's ``config.json`` alone; the gigabytes beside
    it are not read to compare their digests.

    Raises:
        ModelFilesError: the LDM's files are not there or not those of the layer.
    """
    source = latents.source
    afresh = config.initialise == "random" or not config.options.starts_from_ldm
    if features is not None and not afresh:
        folder = open_model(features, model=config.model)
    else:
        folder = find_model(latents, config.model)
        if features is not None:
            _check_config(folder, features)

    def load_unet() -> UNet2DConditionModel:
        return UNet2DConditionModel.from_pretrained(
            folder, subfolder="unet", variant=source["variant"], use_safetensors=True
        )

    ldm = LDMNetwork(read_config(folder, "unet"), None if afresh else load_unet)
    inputs = describe_inputs(
        ldm.config,
        config.blocks,
        view_px=latents.latents.size,
        num_draws=features.features.num_draws if features else 0,
    )
    head = find_head_class(config.name).from_layers(inputs, ldm, config.options)
    assert set(head.feature_channels) == set(config.blocks), (
        f"{config.name}: its options read blocks {config.blocks}, its feature_channels has "
        f"{list(head.feature_channels)}"
    )
    return head


def _check_config(folder: Path, features: LayerSpec) -> None:
    """Compare the UNet's config, but no weights, with a features layer's digest of it."""
    path = folder / _CONFIG
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    if found != features.canonical["weights"][_CONFIG]:
        raise ModelFilesError(
            f"{path}: expected the file that {features.folder} was made with, got "
            f"{'another' if found else 'none'}; name the right folder, or encode a new layer from "
            "this one"
        )
