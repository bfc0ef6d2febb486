"""A new head for a store's layers."""

import hashlib
import logging
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from models.heads.head import Head
from models.heads.inputs import LDMNetwork, describe_inputs
from models.heads.registry import find_head_class, load_head
from models.ldm.family import read_config
from models.ldm.files import ModelFilesError
from pipeline.base.yaml import SpecError
from pipeline.runs.checkpoint import MODEL, read_record, sum_file
from pipeline.runs.config import HeadConfig, HeadStart
from pipeline.spec.layer import LayerSpec
from pipeline.spec.open_model import find_model, open_model

logger = logging.getLogger(__name__)

_CONFIG = "unet/config.json"


def check_model(config: HeadConfig, latents: LayerSpec) -> None:
    """Raise ModelFilesError where the LDM's folder is gone; hub ids and URLs are not asked."""
    name = config.model or latents.source["model"]
    if config.from_ is None and Path(name).expanduser().is_absolute():
        find_model(latents, config.model)


def build_head(config: HeadConfig, latents: LayerSpec, features: LayerSpec | None) -> Head:
    """Build a head for a store's layers: from the LDM's UNet, afresh, or from a checkpoint.

    A head of fresh weights needs of the LDM the UNet's ``config.json`` alone; the gigabytes beside
    it are not read to compare their digests.

    Raises:
        ModelFilesError: the LDM's files are not there or not those of the layer.
        SpecError: the checkpoint is gone or another one, or its head does not fit the layers.
    """

    if config.from_ is not None:
        return _load_start(config, config.from_, latents, features)
    afresh = config.initialise == "random" or not config.options.starts_from_ldm
    return _build_new(config, latents, features, view_px=latents.latents.size, afresh=afresh)


def _build_new(
    config: HeadConfig,
    latents: LayerSpec,
    features: LayerSpec | None,
    *,
    view_px: int,
    afresh: bool,
) -> Head:
    source = latents.source
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
        view_px=view_px,
        num_draws=features.features.num_draws if features else 0,
    )
    head = find_head_class(config.name).from_layers(inputs, ldm, config.options)
    assert set(head.feature_channels) == set(config.blocks), (
        f"{config.name}: its options read blocks {config.blocks}, its feature_channels has "
        f"{list(head.feature_channels)}"
    )
    return head


def _load_start(
    config: HeadConfig, start: HeadStart, latents: LayerSpec, features: LayerSpec | None
) -> Head:
    """Read a checkpoint's averaged head, float32 on the CPU, in training mode.

    Other views, prompts and timesteps than the checkpoint's are fine; of another model it warns.
    """
    folder = Path(start.checkpoint)
    if (found := sum_file(folder / MODEL)) is None or found.sha256 != start.sha256:
        got = f"SHA-256 {found.sha256[:12]}…" if found else "no file"
        raise SpecError(
            f"head.from: {folder / MODEL}: expected SHA-256 {start.sha256[:12]}…, as when the "
            f"config was read, got {got}; name a checkpoint that stays"
        )
    head, record = load_head(folder).float(), read_record(folder)
    for ours, theirs in ((latents, record.latents), (features, record.features)):
        if not ours or not theirs or ours.canonical["weights"] == theirs.canonical["weights"]:
            continue
        models = (
            f"{ours.folder} is of {ours.source['model']}, the checkpoint's layer {theirs.folder} "
            f"of {theirs.source['model']}"
        )
        with torch.device("meta"):  # views of the checkpoint's size: some weights depend on it
            size_px = record.latents.latents.size
            new = _build_new(config, latents, features, view_px=size_px, afresh=True)
        fits, has = ({n: tuple(t.shape) for n, t in x.state_dict().items()} for x in (new, head))
        if wrong := [name for name in {**fits, **has} if fits.get(name) != has.get(name)]:
            raise SpecError(
                f"head.from: the head does not fit the store's layers: {wrong[0]} is "
                f"{has.get(wrong[0])}, for these layers {fits.get(wrong[0])}; {models}"
            )
        logger.warning("head.from: another model's inputs than those it was trained on: %s", models)
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
