"""Stable Diffusion 1.x from CompVis's one file to a folder in diffusers' layout.

Data flow: keys of the file -> parts (UNet, VAE, text encoder, schedule, counters) -> names and
configs of diffusers -> safetensors in a new folder. Each key is converted, or ignored by a rule
that the account names, or an error.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from models.convert.check_weights import check_complete, check_weights, unify_dtype
from models.convert.moving_average import prefer_ema
from models.convert.pickles import write_safetensors
from models.convert.unet_names import ConversionError, list_some, read_unet_config, rename_unet
from models.convert.vae_and_text_names import (
    SD1_SCALING_FACTOR,
    TEXT_PREFIX,
    VAE_PREFIX,
    Renamed,
    convert_text_encoder,
    convert_vae,
    read_scaling_factor,
    read_text_config,
    read_vae_config,
)
from models.ldm.family import read_configs
from models.ldm.files import ModelFilesError
from models.ldm.sd14 import SD14_SCHEDULE
from models.new_folder import write_new_folder

TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
UNET_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema."
SCHEDULE_TOLERANCE = 1e-5
SCHEDULE_RULE = "diffusion schedule, which follows from the scheduler's config"
COUNTERS_RULE = "counters of the moving average"
RAW_RULE = "raw weights of the UNet, whose moving averages are converted"
EMA_RULE = "moving averages of the UNet, whose raw weights are converted"
SCALE_RULE = "scale of the latents, kept in the VAE's config"

# CompVis's DDPM registers these; all but alphas_cumprod follow from it.
_SCHEDULE = frozenset(
    {
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
        *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
        *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
        *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
        *("lvlb_weights", "logvar", "cond_ids"),
    }
)
_COUNTERS = frozenset({"model_ema.decay", "model_ema.num_updates"})
_DIFFUSERS_VERSION = "0.35.0"  # the oldest that the project supports
_SCHEDULER_CONFIG = SD14_SCHEDULE | {
    "_class_name": "PNDMScheduler",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_WEIGHT_NAMES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@dataclass(frozen=True)
class Account:
    """What became of each key of a file: the part it went to, or the rule it was ignored by."""

    converted: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # part -> what was chosen for it

    def describe(self) -> list[str]:
        """Return a line a part and a line a rule, with numbers of keys."""
        lines = []
        for part, num in Counter(self.converted.values()).items():
            note = f" ({self.notes[part]})" if part in self.notes else ""
            lines.append(f"converted {count_keys(num)}: {part}{note}")
        for rule, num in Counter(self.ignored.values()).items():
            lines.append(f"ignored {count_keys(num)}: {rule}")
        return lines


def count_keys(num: int) -> str:
    """Return a number of keys in words."""
    return f"{num} key" if num == 1 else f"{num} keys"


@dataclass(frozen=True)
class Part:
    """One model of a folder: its ``config.json``, and its weights under published names."""

    config: dict[str, Any]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class ConvertedLDM:
    """The parts that a file held, by the names of their folders, and the account of its keys."""

    parts: dict[str, Part]
    account: Account


def convert_ldm(
    state: Mapping[str, Tensor],
    *,
    out: Path,
    tokenizer: Path,
    num_heads: int = 8,
    num_text_heads: int | None = None,
    dtype: torch.dtype | None = None,
    raw: bool = False,
) -> Account:
    """Write a CompVis Stable Diffusion 1.x checkpoint as a diffusers folder.

    Args:
        state: the checkpoint's tensors by name.
        out: the new folder; it must not be there, or be empty.
        tokenizer: folder of the CLIP tokenizer (``vocab.json``, ``merges.txt``), copied.
        num_heads: attention heads of the UNet, which no shape tells (SD 1.x: 8).
        num_text_heads: of the text encoder; default its width over 64.
        dtype: of the weights written; default each part's widest.
        raw: take the UNet's raw weights, not the moving averages beside them.

    Raises:
        ConversionError: a key that is not accounted for, a part that is missing or not whole,
            weights that are no finite floats, a model of another family, another schedule than
            SD 1.4's, or a tokenizer of another vocabulary.
        ValueError: ``out`` holds something, or ``tokenizer`` is none.
    """
    converted = convert_parts(
        state, num_heads=num_heads, num_text_heads=num_text_heads, dtype=dtype, raw=raw
    )
    missing = sorted(set(_WEIGHT_NAMES) - set(converted.parts))
    if missing:
        raise ConversionError(
            f"checkpoint: holds no {', '.join(missing)}; give a whole Stable Diffusion checkpoint"
        )
    with write_new_folder(out) as folder:
        write_ldm(folder, converted.parts, tokenizer=tokenizer)
    return converted.account


def convert_parts(
    state: Mapping[str, Tensor],
    *,
    num_heads: int = 8,
    num_text_heads: int | None = None,
    dtype: torch.dtype | None = None,
    raw: bool = False,
) -> ConvertedLDM:
    """Convert what parts a CompVis state holds; arguments and errors as ``convert_ldm``."""
    account = Account()
    groups = _group_keys(state)
    account.ignored.update(check_schedule(state))
    account.ignored.update(dict.fromkeys(sorted(_COUNTERS & set(state)), COUNTERS_RULE))
    scaling_factor = SD1_SCALING_FACTOR
    if "scale_factor" in state:
        scaling_factor = read_scaling_factor(state["scale_factor"])
        account.ignored["scale_factor"] = SCALE_RULE
    parts = {}
    if groups["unet"]:
        parts["unet"] = _convert_unet(state, groups["unet"], account, num_heads=num_heads, raw=raw)
    if groups["vae"]:
        vae = convert_vae(_strip(state, groups["vae"], VAE_PREFIX))
        _check_read(state, vae, VAE_PREFIX)
        config = read_vae_config(vae.weights, scaling_factor=scaling_factor)
        parts["vae"] = Part(config, vae.weights)
        _enter(account, groups["vae"], "vae", VAE_PREFIX, vae.ignored)
    if groups["text_encoder"]:
        text = convert_text_encoder(_strip(state, groups["text_encoder"], TEXT_PREFIX))
        _check_read(state, text, TEXT_PREFIX)
        config = read_text_config(text.weights, num_heads=num_text_heads)
        parts["text_encoder"] = Part(config, text.weights)
        _enter(account, groups["text_encoder"], "text_encoder", TEXT_PREFIX, text.ignored)
    left = set(state) - set(account.converted) - set(account.ignored)
    assert not left, left
    finished = {name: _finish(name, part, account, dtype) for name, part in parts.items()}
    return ConvertedLDM(finished, account)


def _finish(name: str, part: Part, account: Account, dtype: torch.dtype | None) -> Part:
    check_complete(name, part.config, part.weights)
    weights, note = unify_dtype(part.weights, dtype)
    if note:
        account.notes[name] = "; ".join(filter(None, (account.notes.get(name), note)))
    return Part(part.config, weights)


def _group_keys(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {"unet": [], "vae": [], "text_encoder": []}
    starts = {
        UNET_PREFIX: "unet",
        EMA_PREFIX: "unet",
        VAE_PREFIX: "vae",
        TEXT_PREFIX: "text_encoder",
    }
    unknown = []
    for key in state:
        if key in _SCHEDULE | _COUNTERS | {"scale_factor"}:
            continue
        start = next((start for start in starts if key.startswith(start)), None)
        if start is None:
            unknown.append(key)
        else:
            groups[starts[start]].append(key)
    if unknown:
        hint = ""
        if any(key.startswith("cond_stage_model.model.") for key in unknown):
            hint = " (an OpenCLIP text encoder: Stable Diffusion 2)"
        raise ConversionError(
            f"checkpoint: {len(unknown)} keys are of no known part{hint}: {list_some(unknown)}; "
            "this converts Stable Diffusion 1.x and the published LD-ZNet"
        )
    return groups


def _convert_unet(
    state: Mapping[str, Tensor], keys: Iterable[str], account: Account, *, num_heads: int, raw: bool
) -> Part:
    weights, report = prefer_ema(state, raw=raw)
    check_weights({key: state[key] for key in report.sources.values()})
    renamed = rename_unet(weights)
    used = set(report.sources.values())
    for key in keys:
        if key in used:
            account.converted[key] = "unet"
        else:
            account.ignored[key] = EMA_RULE if report.left else RAW_RULE
    account.notes["unet"] = str(report)
    config = read_unet_config(weights, num_heads=num_heads)
    config |= {"_class_name": "UNet2DConditionModel", "sample_size": 64}
    return Part(config, {renamed[name]: tensor for name, tensor in weights.items()})


def _check_read(state: Mapping[str, Tensor], renamed: Renamed, prefix: str) -> None:
    """Check the weights that a part takes, under the checkpoint's own keys."""
    check_weights(
        {
            key: tensor
            for key, tensor in state.items()
            if key.startswith(prefix) and key.removeprefix(prefix) not in renamed.ignored
        }
    )


def _strip(state: Mapping[str, Tensor], keys: Iterable[str], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): state[key] for key in keys}


def _enter(
    account: Account, keys: Iterable[str], part: str, prefix: str, ignored: Mapping[str, str]
) -> None:
    for key in keys:
        rule = ignored.get(key.removeprefix(prefix))
        if rule is None:
            account.converted[key] = part
        else:
            account.ignored[key] = rule


def sd1_alphas_cumprod() -> Tensor:
    """Return ᾱ_t of Stable Diffusion 1.x, (1000,) float64: betas linear in their square roots."""
    low, high = (_SCHEDULER_CONFIG[f"beta_{end}"] ** 0.5 for end in ("start", "end"))
    betas = torch.linspace(low, high, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def is_schedule(key: str) -> bool:
    """Tell whether a key is one of the schedule's buffers."""
    return key in _SCHEDULE


def check_schedule(state: Mapping[str, Tensor], *, prefix: str = "") -> dict[str, str]:
    """Hold ``alphas_cumprod``, where it is there, to SD 1.4's; return key -> rule of the buffers.

    Raises:
        ConversionError: it differs by more than 1e-5 (a half precision's: by its rounding).
    """
    found = state.get(f"{prefix}alphas_cumprod")
    if found is not None:
        expected = sd1_alphas_cumprod()
        limit = max(SCHEDULE_TOLERANCE, _rounding(found.dtype))
        error = (
            float((found.double() - expected).abs().max())
            if found.shape == expected.shape
            else float("inf")
        )
        if not error <= limit:
            raise ConversionError(
                f"{prefix}alphas_cumprod: expected Stable Diffusion 1.4's schedule (1000 steps, "
                f"0.00085 to 0.012) within {limit:.0e}, got {tuple(found.shape)} off by {error:.1e}"
            )
    return {key: SCHEDULE_RULE for key in state if key.removeprefix(prefix) in _SCHEDULE}


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0.0


def write_ldm(folder: Path, parts: Mapping[str, Part], *, tokenizer: Path) -> None:
    """Write parts, the tokenizer's files, SD 1.4's schedule and ``model_index.json``.

    The index names the parts that ``folder`` then has, with those that were there before.

    Raises:
        ConversionError: the tokenizer's vocabulary is not the text encoder's, or the model is of a
            family that is not read; no weights are written then.
        ValueError: ``tokenizer`` holds no CLIP tokenizer.
    """
    copy_tokenizer(tokenizer, folder / "tokenizer", parts.get("text_encoder"))
    for name, part in parts.items():
        _write_json(folder / name / "config.json", part.config)
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER_CONFIG)
    absent = {name for name in _WEIGHT_NAMES if not (folder / name).is_dir()}
    index = {name: kind for name, kind in _MODEL_INDEX.items() if name not in absent}
    _write_json(folder / "model_index.json", index)
    _check_family(folder)
    for name, part in parts.items():
        write_safetensors(part.weights, folder / name / _WEIGHT_NAMES[name])


def _check_family(folder: Path) -> None:
    try:
        read_configs(folder)
    except ModelFilesError as error:
        # The folder is a temporary one, gone when this is read.
        reason = str(error).replace(f"{folder}/", "")
        raise ConversionError(f"checkpoint: is of a model that is not read: {reason}") from error


def copy_tokenizer(source: Path, folder: Path, text_encoder: Part | None) -> None:
    """Copy a tokenizer's files, its size held to the text encoder's vocabulary."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if names[:2] != ["vocab.json", "merges.txt"]:
        raise ValueError(
            f"{source}: expected a CLIP tokenizer's folder with vocab.json and merges.txt, "
            f"got {names}; give one by --tokenizer"
        )
    num_tokens = len(CLIPTokenizer.from_pretrained(source))
    if text_encoder is not None and num_tokens != text_encoder.config["vocab_size"]:
        raise ConversionError(
            f"{source}: has {num_tokens} tokens, but the checkpoint's text encoder "
            f"{text_encoder.config['vocab_size']}; give the tokenizer it was trained with"
        )
    folder.mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if "_class_name" in content:  # a config of diffusers, not of transformers
        content = {"_diffusers_version": _DIFFUSERS_VERSION, **content}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
