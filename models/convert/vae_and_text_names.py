"""Names of CompVis's VAE and CLIP text encoder, turned into those of diffusers' published files.

Source of both sides: the parameter names of the two libraries. A VAE's blocks keep their order but
in the decoder, whose ``up.N`` CompVis counts from the finest and diffusers from the coarsest. The
VAE's attention is a 1×1 convolution there and a linear layer here: the same numbers in another
shape. The text encoder is transformers' own in both, under another prefix.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.convert.unet_names import NORM_GROUPS, ConversionError

VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."
SD1_SCALING_FACTOR = 0.18215
"""What Stable Diffusion 1.x multiplies latents by: CompVis's ``scale_factor``."""

CLIP_HEAD_CHANNELS = 64
"""Channels of an attention head in every published CLIP text encoder."""

_VAE_IGNORED = (
    (re.compile(r"(loss|discriminator)\."), "the VAE's training loss and discriminator"),
    (re.compile(r"model_ema\.(decay|num_updates)$"), "counters of the moving average"),
)
_TEXT_IGNORED = (
    (re.compile(r"(text_model\.)?embeddings\.position_ids$"), "position ids, counted when loaded"),
)
_RESNET = {
    **{f"{part}{n}": f"{part}{n}" for part in ("norm", "conv") for n in (1, 2)},
    "nin_shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_ENDS = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}


@dataclass(frozen=True)
class Renamed:
    """Weights under their new names, and the old names left out, each with its reason."""

    weights: dict[str, Tensor]
    ignored: dict[str, str]


def convert_vae(state: Mapping[str, Tensor]) -> Renamed:
    """Rename a VAE's weights: CompVis names without ``first_stage_model.``, to diffusers'.

    Raises:
        ConversionError: a name that is not SD 1.x's VAE's.
    """
    kept, ignored = _split(state, _VAE_IGNORED)
    levels = {int(found[1]) for name in kept if (found := re.match(r"decoder\.up\.(\d+)\.", name))}
    weights = {}
    for name, tensor in kept.items():
        renamed = _rename_vae(name, last_level=max(levels, default=0))
        if renamed is None:
            raise _unknown(VAE_PREFIX + name, tensor, "VAE")
        if ".attentions." in renamed and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        weights[renamed] = tensor
    return Renamed(weights, ignored)


def _rename_vae(name: str, *, last_level: int) -> str | None:
    if name.rpartition(".")[2] not in ("weight", "bias"):
        return None
    module, _, kind = name.rpartition(".")
    if module in ("quant_conv", "post_quant_conv"):
        return name
    side, _, rest = module.partition(".")
    if side not in ("encoder", "decoder"):
        return None
    for pattern, rename in _vae_rules(side, last_level).items():
        if found := re.fullmatch(pattern, rest):
            return f"{side}.{rename(found)}.{kind}"
    return None


def _vae_rules(side: str, last_level: int) -> dict[str, Callable[[re.Match[str]], str]]:
    """Return pattern → new name, of what stands between side and kind."""
    resnet = f"({'|'.join(_RESNET)})"
    rules: dict[str, Callable[[re.Match[str]], str]] = {
        f"({'|'.join(_ENDS)})": lambda m: _ENDS[m[1]],
        rf"mid\.block_([12])\.{resnet}": (
            lambda m: f"mid_block.resnets.{int(m[1]) - 1}.{_RESNET[m[2]]}"
        ),
        rf"mid\.attn_1\.({'|'.join(_ATTENTION)})": (
            lambda m: f"mid_block.attentions.0.{_ATTENTION[m[1]]}"
        ),
    }
    if side == "encoder":
        rules[rf"down\.(\d+)\.block\.(\d+)\.{resnet}"] = lambda m: (
            f"down_blocks.{m[1]}.resnets.{m[2]}.{_RESNET[m[3]]}"
        )
        rules[r"down\.(\d+)\.downsample\.conv"] = lambda m: (
            f"down_blocks.{m[1]}.downsamplers.0.conv"
        )
    else:
        rules[rf"up\.(\d+)\.block\.(\d+)\.{resnet}"] = lambda m: (
            f"up_blocks.{last_level - int(m[1])}.resnets.{m[2]}.{_RESNET[m[3]]}"
        )
        rules[r"up\.(\d+)\.upsample\.conv"] = lambda m: (
            f"up_blocks.{last_level - int(m[1])}.upsamplers.0.conv"
        )
    return rules


def convert_text_encoder(state: Mapping[str, Tensor]) -> Renamed:
    """Rename a CLIP text encoder's weights, without ``cond_stage_model.transformer.``.

    The result carries ``text_model.``, as published files do. Names may lack it, as transformers 5
    has them in memory.

    Raises:
        ConversionError: a name that is not a CLIP text encoder's.
    """
    kept, ignored = _split(state, _TEXT_IGNORED)
    weights = {}
    for name, tensor in kept.items():
        renamed = f"text_model.{name.removeprefix('text_model.')}"
        if renamed in weights or not _TEXT_NAME.fullmatch(renamed):
            raise _unknown(TEXT_PREFIX + name, tensor, "text encoder")
        weights[renamed] = tensor
    return Renamed(weights, ignored)


_TEXT_NAME = re.compile(
    r"text_model\.(?:"
    r"embeddings\.(?:token|position)_embedding\.weight"
    r"|final_layer_norm\.(?:weight|bias)"
    r"|encoder\.layers\.\d+\.(?:layer_norm[12]|mlp\.fc[12]|self_attn\.(?:[qkv]|out)_proj)"
    r"\.(?:weight|bias))"
)


def _split(
    state: Mapping[str, Tensor], rules: tuple[tuple[re.Pattern[str], str], ...]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    ignored = {
        name: rule
        for name in state
        for pattern, rule in reversed(rules)  # the first rule that matches wins
        if pattern.match(name)
    }
    return {name: value for name, value in state.items() if name not in ignored}, ignored


def _unknown(name: str, tensor: Tensor, part: str) -> ConversionError:
    return ConversionError(
        f"{name} {tuple(tensor.shape)}: is no name of Stable Diffusion 1.x's {part} in CompVis's "
        "layout; this converts SD 1.x and the published LD-ZNet alone"
    )


def read_scaling_factor(scale: Tensor) -> float:
    """Return a checkpoint's ``scale_factor``, to seven digits, as float32 holds it.

    SD 1.x's 0.18215, rounded to half precision by whoever shortened the file, is that again.

    Raises:
        ConversionError: it is no finite number above 0.
    """
    number = float(scale) if scale.numel() == 1 and not scale.is_complex() else math.nan
    if not 0 < number < math.inf:
        raise ConversionError(
            f"scale_factor: expected one finite number above 0, got {scale.tolist()}; Stable "
            f"Diffusion 1.x has {SD1_SCALING_FACTOR}"
        )
    halves = (torch.float16, torch.bfloat16)
    if number in [float(torch.tensor(SD1_SCALING_FACTOR, dtype=dtype)) for dtype in halves]:
        return SD1_SCALING_FACTOR
    return round(number, 7)


def read_vae_config(
    state: Mapping[str, Tensor], *, scaling_factor: float, num_groups: int = NORM_GROUPS
) -> dict[str, Any]:
    """Return diffusers' config of a VAE from its shapes, names as ``convert_vae`` gives them.

    ``scaling_factor`` and ``num_groups`` are in no shape.

    Raises:
        ConversionError: a weight that the config needs is missing, or the encoder's widths are
            not multiples of ``num_groups``.
    """
    num_levels = _count(state, r"encoder\.down_blocks\.(\d+)\.resnets\.0\.conv1\.weight", "VAE")
    num_resnets = _count(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.conv1\.weight", "VAE")
    widths = [
        _shape(state, f"encoder.down_blocks.{level}.resnets.0.conv1.weight", "VAE", 4)[0]
        for level in range(num_levels)
    ]
    if any(width % num_groups for width in widths):
        raise ConversionError(
            f"VAE: widths must be multiples of {num_groups}, the groups of its norms, got {widths}"
        )
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "in_channels": _shape(state, "encoder.conv_in.weight", "VAE", 4)[1],
        "latent_channels": _shape(state, "post_quant_conv.weight", "VAE", 4)[1],
        "layers_per_block": num_resnets,
        "norm_num_groups": num_groups,
        "out_channels": _shape(state, "decoder.conv_out.weight", "VAE", 4)[0],
        "sample_size": 512,
        "scaling_factor": scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
    }


def read_text_config(
    state: Mapping[str, Tensor], *, num_heads: int | None = None
) -> dict[str, Any]:
    """Return transformers' config of a CLIP text encoder from its shapes.

    Names as ``convert_text_encoder`` gives them. ``num_heads`` is in no shape: by default the
    width over 64. The activation is CLIP's own, ``quick_gelu``. The ids of start and end are the
    vocabulary's last two, where CLIP's tokenizer has them (49406 and 49407).

    Raises:
        ConversionError: a weight that the config needs is missing, or the heads do not divide the
            width.
    """
    part = "text encoder"
    vocab_size, width = _shape(state, "text_model.embeddings.token_embedding.weight", part, 2)
    heads = num_heads or max(1, width // CLIP_HEAD_CHANNELS)
    if width % heads:
        raise ConversionError(f"text encoder: {heads} heads do not divide its width {width}")
    layers = r"text_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.weight"
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": _shape(state, "text_model.encoder.layers.0.mlp.fc1.weight", part, 2)[
            0
        ],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": _shape(
            state, "text_model.embeddings.position_embedding.weight", part, 2
        )[0],
        "model_type": "clip_text_model",
        "num_attention_heads": heads,
        "num_hidden_layers": _count(state, layers, part),
        "pad_token_id": 1,
        "projection_dim": width,
        "vocab_size": vocab_size,
    }


def _count(state: Mapping[str, Tensor], pattern: str, part: str) -> int:
    numbers = {int(found[1]) for name in state if (found := re.fullmatch(pattern, name))}
    if not numbers or numbers != set(range(len(numbers))):
        raise ConversionError(f"{part}: expected {pattern} numbered from 0, got {sorted(numbers)}")
    return len(numbers)


def _shape(state: Mapping[str, Tensor], name: str, part: str, ndim: int) -> tuple[int, ...]:
    if name not in state:
        raise ConversionError(f"{part}: the checkpoint lacks {name} (its name in diffusers)")
    if state[name].ndim != ndim:
        raise ConversionError(
            f"{part}: {name} (its name in diffusers) must have {ndim} dimensions, got shape "
            f"{tuple(state[name].shape)}"
        )
    return tuple(state[name].shape)
