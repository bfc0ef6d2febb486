"""Converts Stable Diffusion 1.x in a CompVis checkpoint to a folder in diffusers' layout.

The config of each model is read off the shapes of its weights. The classes of diffusers and
transformers, built from it without memory, say which weights there must be; these are looked up by
their CompVis names, so that each key is converted, ignored by a rule that the account names, or an
error.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.convert.check_weights import match_weights, unify_dtype
from models.convert.configs import (
    read_scaling_factor,
    read_text_config,
    read_unet_config,
    read_vae_config,
)
from models.convert.names import ConversionError, map_unet_names, map_vae_names
from models.convert.pickles import write_safetensors
from models.convert.sort_keys import FROZEN_PREFIX, SortedState
from models.ldm.family import read_configs
from models.ldm.files import ModelFilesError, write_config
from models.ldm.sd14 import SD14_INDEX, SD14_SCHEDULE, SD14_VAE, TEXT_PREFIX

TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
SCHEDULE_TOLERANCE = 1e-5
WEIGHT_FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
_SCHEDULER_CONFIG = SD14_SCHEDULE | {
    "_class_name": "PNDMScheduler",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
_INDEX = SD14_INDEX | {
    "requires_safety_checker": False,
    "scheduler": ["diffusers", "PNDMScheduler"],
}


@dataclass(frozen=True)
class Component:
    """A network of a diffusers folder: its ``config.json``, and its weights by published names."""

    config: dict[str, Any]
    weights: dict[str, Tensor]


def convert_ldm(
    state: SortedState, *, num_heads: int = 8, dtype: torch.dtype | None = None, raw: bool = False
) -> dict[str, Component]:
    """Convert what a checkpoint holds of UNet, VAE and text encoder, and enter it in its account.

    Args:
        state: the checkpoint's tensors, sorted.
        num_heads: attention heads of the UNet, which no shape tells (SD 1.x: 8).
        dtype: of the weights; default each model's widest.
        raw: take the UNet's raw weights, not the moving averages beside them.

    Raises:
        ConversionError: a model that is not whole or has a weight that is no finite float, or
            another schedule than SD 1.4's.
    """
    scaling_factor = SD14_VAE["scaling_factor"]
    for key in state.account.ignored:
        name = key.removeprefix(FROZEN_PREFIX)
        if name == "alphas_cumprod":
            check_schedule(state.tensors[key])
        elif name == "scale_factor":
            scaling_factor = read_scaling_factor(state.tensors[key])
    models = {}
    if "unet" in state.keys:
        weights = state.select_weights("unet", raw=raw)
        prefix = f"{state.prefixes['unet']}diffusion_model."
        models["unet"] = convert_unet(weights, num_heads=num_heads, prefix=prefix)
    if "vae" in state.keys:
        models["vae"] = _convert_vae(state, scaling_factor)
    if "text_encoder" in state.keys:
        models["text_encoder"] = _convert_text_encoder(state)
    for name, model in models.items():
        weights, note = unify_dtype(model.weights, dtype)
        state.account.add_note(name, note)
        models[name] = Component(model.config, weights)
    return models


def convert_unet(
    weights: Mapping[str, Tensor], *, num_heads: int = 8, prefix: str = ""
) -> Component:
    """Convert a UNet's weights, by their names below ``model.diffusion_model.``.

    ``prefix`` stands before the names in the checkpoint, for errors.

    Raises:
        ConversionError: a weight is missing, unknown or of another shape, or the heads do not
            divide a width.
    """
    config = read_unet_config(weights, num_heads=num_heads)
    network = build_empty("unet", UNet2DConditionModel, config)
    names = map_unet_names(network.state_dict())
    return Component(config, match_weights(weights, network, names, where="unet", prefix=prefix))


def _convert_vae(state: SortedState, scaling_factor: float) -> Component:
    weights = {
        # The attention's 1×1 convolutions are linear layers in diffusers.
        name: w[:, :, 0, 0] if ".attn_1." in name and w.shape[2:] == (1, 1) else w
        for name, w in state.list_weights("vae").items()
    }
    config = read_vae_config(weights, scaling_factor=scaling_factor)
    network = build_empty("vae", AutoencoderKL, config)
    names = map_vae_names(network.state_dict())
    prefix = state.prefixes["vae"]
    return Component(config, match_weights(weights, network, names, where="vae", prefix=prefix))


def _convert_text_encoder(state: SortedState) -> Component:
    """Convert a CLIP text encoder: transformers' names, with or without ``text_model.``."""
    weights, prefix = state.list_weights("text_encoder"), state.prefixes["text_encoder"]
    start = TEXT_PREFIX if any(name.startswith(TEXT_PREFIX) for name in weights) else ""
    config = read_text_config({name.removeprefix(start): w for name, w in weights.items()})
    network = build_empty("text_encoder", CLIPTextModel, config)
    names = {name: start + name.removeprefix(TEXT_PREFIX) for name in network.state_dict()}
    matched = match_weights(weights, network, names, where="text_encoder", prefix=prefix)
    published = {TEXT_PREFIX + name.removeprefix(TEXT_PREFIX): w for name, w in matched.items()}
    return Component(config, published)


def build_empty(where: str, kind: type[Any], config: Mapping[str, Any]) -> nn.Module:
    """Build a class from its config on the meta device, without memory for its weights.

    Raises:
        ConversionError: the class refuses the config.
    """
    try:
        with torch.device("meta"):
            if kind is CLIPTextModel:
                return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))
            network: nn.Module = kind.from_config(dict(config))
            return network
    except (ValueError, ArithmeticError) as error:
        raise ConversionError(
            f"{where}: no model has the shapes of its weights: {error}"
        ) from error


def check_schedule(alphas_cumprod: Tensor) -> None:
    """Compare ᾱ (1000,) of a checkpoint or a scheduler with SD 1.4's.

    Raises:
        ConversionError: it differs by more than 1e-5 (a half precision's: by its rounding).
    """
    low, high = (SD14_SCHEDULE[f"beta_{end}"] ** 0.5 for end in ("start", "end"))
    betas = torch.linspace(low, high, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1.0 - betas, dim=0)
    limit = SCHEDULE_TOLERANCE
    if alphas_cumprod.dtype in (torch.float16, torch.bfloat16):
        limit = torch.finfo(alphas_cumprod.dtype).eps
    error = float("inf")
    if alphas_cumprod.shape == expected.shape:
        error = float((alphas_cumprod.double() - expected).abs().max())
    if not error <= limit:  # NaN too
        raise ConversionError(
            "alphas_cumprod: expected Stable Diffusion 1.4's schedule (1000 steps, 0.00085 to "
            f"0.012) within {limit:.0e}, got {tuple(alphas_cumprod.shape)} off by {error:.1e}"
        )


def write_ldm(folder: Path, models: Mapping[str, Component], *, tokenizer: Path) -> None:
    """Write models, the tokenizer's files, SD 1.4's schedule and ``model_index.json``.

    The index names the models that ``folder`` then has, with those that were there before.

    Raises:
        ConversionError: the tokenizer's vocabulary is not the text encoder's, or the model is of a
            family that is not read; no weights are written then.
        ValueError: ``tokenizer`` holds no CLIP tokenizer.
    """
    _copy_tokenizer(tokenizer, folder / "tokenizer", models.get("text_encoder"))
    for name, model in models.items():
        write_config(folder / name / "config.json", model.config)
    write_config(folder / "scheduler" / "scheduler_config.json", _SCHEDULER_CONFIG)
    absent = {name for name in WEIGHT_FILES if not (folder / name).is_dir()}
    index = {name: kind for name, kind in _INDEX.items() if name not in absent}
    write_config(folder / "model_index.json", index)
    try:
        read_configs(folder)
    except ModelFilesError as error:
        # The folder is a temporary one, gone when this is read.
        reason = str(error).replace(f"{folder}/", "")
        raise ConversionError(f"checkpoint: is of a model that is not read: {reason}") from error
    for name, model in models.items():
        write_safetensors(model.weights, folder / name / WEIGHT_FILES[name])


def _copy_tokenizer(source: Path, folder: Path, text_encoder: Component | None) -> None:
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if names[:2] != ["vocab.json", "merges.txt"]:
        raise ValueError(
            f"{source}: expected a CLIP tokenizer's folder with vocab.json and merges.txt, "
            f"got {names}; give one by --tokenizer"
        )
    num_tokens = len(CLIPTokenizer.from_pretrained(source))
    vocab_size = text_encoder.config["vocab_size"] if text_encoder else num_tokens
    if num_tokens != vocab_size:
        raise ConversionError(
            f"{source}: has {num_tokens} tokens, but the checkpoint's text encoder {vocab_size}; "
            "give the tokenizer it was trained with"
        )
    folder.mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / name, folder / name)
