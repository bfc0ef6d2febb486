"""Checks that a model is of a family that is read: Stable Diffusion 1, 2 or SDXL base.

The family is told from the configs in the model's diffusers folder, before any weight is read; any
other is refused with the reason. Finetunes are of their base model's family.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.ldm.files import ModelFilesError, has_second_text_encoder
from models.ldm.unet_config import (
    LATENT_DOWNSCALE,
    NUM_TIME_IDS,
    read_pooled_width,
    read_text_width,
)

NUM_TRAIN_TIMESTEPS = 1000
_CLIP = "CLIPTextModel"
_OWNERS = {
    "vae": "VAE's",
    "unet": "UNet's",
    "text_encoder": "text encoder's",
    "text_encoder_2": "second text encoder's",
    "scheduler": "scheduler's",
}
# Options that add a condition, change a spatial transformer, or that diffusers refuses.
_UNET_OPTIONS = {
    "class_embed_type": "a class condition (unCLIP)",
    "num_class_embeds": "a class or noise level condition (the x4 upscaler)",
    "time_cond_proj_dim": "a guidance condition (latent consistency models)",
    "encoder_hid_dim_type": "projected text or image conditions (Kandinsky, DeepFloyd IF)",
    "encoder_hid_dim": "projected text (DeepFloyd IF)",
    "num_attention_heads": "diffusers takes the heads under attention_head_dim alone",
    "dual_cross_attention": "two texts a transformer (Versatile Diffusion)",
}
_BETAS = ("beta_start", "beta_end", "beta_schedule")
_TRANSFORMER_STAGES = {"CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D"}


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """Read the JSON config of a component, such as ``unet`` or ``scheduler``.

    Raises:
        ModelFilesError: it is not there, or not a JSON object.
    """
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    path = folder / component / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError(f"expected an object, got {type(config).__name__}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelFilesError(
            f"{path}: cannot be read as the {_OWNERS[component]} config: {error!r}"
        ) from error
    return config


def read_configs(folder: Path, *, need: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Read the config of each component that a model's folder has, and check the model's family.

    A component that the folder lacks is left out of the returned component → config, unless
    ``need`` names it: whoever loads its weights reports that it is missing.

    Raises:
        ModelFilesError: the model is of a family that is not read (the message says which component
            and why), or a config is not there or not a JSON object.
    """
    if (folder / "transformer").is_dir():
        raise ModelFilesError(
            f"{folder}: expected a UNet (Stable Diffusion 1, 2, SDXL base), got a diffusion "
            "transformer, as SD 3 and later models have"
        )
    there = {name for name in _OWNERS if name in need or (folder / name).is_dir()}
    if "text_encoder_2" in there and "text_encoder" not in there:
        raise ModelFilesError(
            f"{folder}: has text_encoder_2 but no text_encoder, as SDXL's refiner; it starts from "
            "the base model's images, so use the base model"
        )
    configs = {name: read_config(folder, name) for name in sorted(there)}
    if "vae" in configs:
        _check_vae(configs["vae"], where=f"{folder / 'vae'}")
    if "scheduler" in configs:
        _check_scheduler(configs["scheduler"], where=f"{folder / 'scheduler'}")
    for component, kind in (("text_encoder", _CLIP), ("text_encoder_2", f"{_CLIP}WithProjection")):
        if component in configs:
            _check_text_encoder(configs[component], kind, where=f"{folder / component}")
    if "unet" in configs:
        check_unet(configs["unet"], where=f"{folder / 'unet'}")
        _check_fit(configs, where=f"{folder / 'unet'}")
    return configs


def check_unet(config: Mapping[str, Any], *, where: str) -> None:
    """Check that a UNet takes a latent, a timestep and a text, and what SDXL adds, nothing else.

    Raises:
        ModelFilesError: it takes something else, texts of several widths for one, or has no
            spatial transformers.
    """
    _check_class(config, "UNet2DConditionModel", where=where)
    for key, reason in _UNET_OPTIONS.items():
        if config.get(key):
            raise ModelFilesError(f"{where}: {key} is {config[key]!r}: {reason}, which is not read")
    try:
        read_pooled_width(config)
        read_text_width(config)
    except ValueError as error:
        raise ModelFilesError(f"{where}: {error}") from error
    stages = [
        *(config.get("down_block_types") or ["CrossAttnDownBlock2D"]),
        config.get("mid_block_type", "UNetMidBlock2DCrossAttn"),
        *(config.get("up_block_types") or ["CrossAttnUpBlock2D"]),
    ]
    if not _TRANSFORMER_STAGES.intersection(stages):
        raise ModelFilesError(
            f"{where}: expected spatial transformers (Transformer2DModel) in some of its stages, "
            f"got {', '.join(map(str, stages))}"
        )


def check_scaling_factor(factor: object, *, where: str) -> None:
    """Check that a VAE's scaling factor is a finite number above 0.

    Raises:
        ModelFilesError: it is something else.
    """
    if type(factor) not in (int, float) or not 0 < factor < math.inf:  # type: ignore[operator]
        raise ModelFilesError(
            f"{where}: scaling_factor must be a finite number above 0, got {factor!r}; fetch the "
            "VAE's config.json again"
        )


def _check_class(config: Mapping[str, Any], expected: str, *, where: str) -> None:
    found = config.get("_class_name", expected)
    if found != expected:
        raise ModelFilesError(f"{where}: expected a model of class {expected}, got {found!r}")


def _check_vae(config: Mapping[str, Any], *, where: str) -> None:
    _check_class(config, "AutoencoderKL", where=where)
    widths = config.get("block_out_channels")
    if isinstance(widths, Sequence) and 2 ** (len(widths) - 1) != LATENT_DOWNSCALE:
        raise ModelFilesError(
            f"{where}: expected a VAE of factor {LATENT_DOWNSCALE} (4 levels), got factor "
            f"{2 ** (len(widths) - 1)} ({len(widths)} levels)"
        )
    if "scaling_factor" in config:
        check_scaling_factor(config["scaling_factor"], where=where)
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise ModelFilesError(
                f"{where}: {key} is set: latents that are shifted as well as scaled are not read"
            )


def _check_scheduler(config: Mapping[str, Any], *, where: str) -> None:
    """Check that the schedule is given by betas; the class, a sampling method, does not matter."""
    name = config.get("_class_name", "a scheduler")
    betas = config.get("trained_betas")
    missing = [] if betas else [key for key in _BETAS if config.get(key) is None]
    if missing or config.get("use_flow_sigmas"):
        got = f"without {', '.join(missing)}" if missing else "with use_flow_sigmas"
        raise ModelFilesError(
            f"{where}: expected a noise schedule given by betas, got {name} {got} (flow matching "
            "and EDM noise their latents in another way; a config that is silent would be taken "
            "for another schedule than the model was trained with)"
        )
    num = len(betas) if betas else config.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS)
    if num != NUM_TRAIN_TIMESTEPS:
        raise ModelFilesError(f"{where}: expected {NUM_TRAIN_TIMESTEPS} timesteps, got {num}")


def _check_text_encoder(config: Mapping[str, Any], kind: str, *, where: str) -> None:
    found = config.get("architectures") or [kind]
    model_type = config.get("model_type", "clip_text_model")
    if list(found) != [kind] or model_type not in ("clip_text_model", "clip"):
        raise ModelFilesError(
            f"{where}: expected a text encoder of class {kind} (SD 1 and 2 have one CLIPTextModel, "
            f"SDXL a CLIPTextModelWithProjection beside it), got {', '.join(map(str, found))} "
            f"of type {model_type!r}"
        )


def _check_fit(configs: Mapping[str, Mapping[str, Any]], *, where: str) -> None:
    """Check that the UNet reads what the VAE and the text encoders of the same folder give."""
    unet = configs["unet"]
    if "vae" in configs:
        channels = unet.get("in_channels", 4), configs["vae"].get("latent_channels", 4)
        if channels[0] != channels[1]:
            raise ModelFilesError(
                f"{where}: expected in_channels {channels[1]}, those of the VAE's latent, got "
                f"{channels[0]}: inpainting, depth and image-to-image UNets read more, which is "
                "not given to them"
            )
    encoders = [configs[x] for x in ("text_encoder", "text_encoder_2") if x in configs]
    if not encoders:
        return
    reads = read_pooled_width(unet)
    if (reads is not None) != (len(encoders) == 2):
        raise ModelFilesError(
            f"{where}: addition_embed_type must be {'text_time' if len(encoders) == 2 else None!r} "
            f"beside {len(encoders)} text encoder(s), got {unet.get('addition_embed_type')!r}"
        )
    gives = encoders[-1].get("projection_dim", reads)
    if reads not in (None, gives):
        raise ModelFilesError(
            f"{where}: expected added conditions of {NUM_TIME_IDS} time ids and a pooled text of "
            f"width {gives}, got room for a text of width {reads} beside them; SDXL's refiner has "
            "5 time ids and is not read"
        )
    widths = [x["hidden_size"] for x in encoders if isinstance(x.get("hidden_size"), int)]
    context = read_text_width(unet)
    if len(widths) == len(encoders) and sum(widths) != context:
        raise ModelFilesError(
            f"{where}: cross_attention_dim must be {sum(widths)}, the text encoders' width, "
            f"got {context}"
        )


def read_text_pooled_width(configs: Mapping[str, Mapping[str, Any]]) -> int | None:
    """Return the width of a model's pooled text embedding, None where it has none (SD 1 and 2)."""
    second = configs.get("text_encoder_2")
    return None if second is None else int(second.get("projection_dim", 512))


def zeroes_empty_prompt(folder: Path) -> bool:
    """Tell whether a folder's empty prompt is zeros, tokens and pooled: SDXL's is.

    SDXL was trained with its text embeddings zeroed where the prompt was dropped (Stability-AI's
    generative-models, sgm/modules/encoders/modules.py, GeneralConditioner with ucg_rate), and
    diffusers' StableDiffusionXLPipeline.encode_prompt gives zeros for no prompt where
    ``model_index.json`` says ``force_zeros_for_empty_prompt``, by default true. SD 1 and 2 were
    trained with CLIP's embedding of the empty text.

    Raises:
        ModelFilesError: ``model_index.json`` is there but cannot be read.
    """
    path = folder / "model_index.json"
    if not has_second_text_encoder(folder):
        return False
    if not path.is_file():
        return True
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        return bool(index.get("force_zeros_for_empty_prompt", True))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelFilesError(f"{path}: cannot be read as a model's index: {error!r}") from error
