"""CompVis's names for the parameters of diffusers' UNet and VAE, and of LD-ZNet's head.

The class says which parameters a model has, whatever its depth and width; here each of them gets
the name that it has in a CompVis checkpoint. CompVis numbers a UNet's stages in one row
(``input_blocks.N.M``, ``middle_block.M``, ``output_blocks.N.M``), diffusers by level. It counts the
VAE decoder's levels from the finest, diffusers from the coarsest. What LD-ZNet adds inside a
transformer (``attn3``, ``norm_sd``) has one name in both.
"""

import re
from collections.abc import Iterable

from diffusers import UNet2DConditionModel

from models.ldm.blocks import list_blocks

_UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_STAGE = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)")
_VAE_RULES = (
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"(down|up)_blocks\.(\d+)\.resnets", r"\1.\2.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
)


class ConversionError(ValueError):
    """A checkpoint that cannot be converted whole."""


def map_unet_names(names: Iterable[str]) -> dict[str, str]:
    """Map each parameter of a UNet2DConditionModel to its name below ``model.diffusion_model.``."""
    names = list(names)
    resnets = {name.split(".")[3] for name in names if name.startswith("down_blocks.0.resnets.")}
    attending = {name.partition(".attentions.")[0] for name in names if ".attentions." in name}
    return {name: _name_unet_parameter(name, len(resnets) + 1, attending) for name in names}


def _name_unet_parameter(name: str, per_level: int, attending: set[str]) -> str:
    """Return a CompVis name; a level has ``per_level`` stages, a sampler included on the way down.

    ``attending`` are the stages with transformers, ``up_blocks.1`` and so on.
    """
    stage = _STAGE.fullmatch(name)
    if stage is None:
        module, _, parameter = name.rpartition(".")
        return f"{_UNET_TOP[module]}.{parameter}"
    row, level, kind, number, inner = stage.groups()
    is_transformer = int(kind == "attentions")
    if row is None:
        place = f"middle_block.{is_transformer or 2 * int(number)}"
    elif kind == "downsamplers":
        place, inner = f"input_blocks.{(int(level) + 1) * per_level}.0", f"op{inner[4:]}"
    elif kind == "upsamplers":
        last = (int(level) + 1) * per_level - 1
        place = f"output_blocks.{last}.{2 if f'up_blocks.{level}' in attending else 1}"
    else:
        position = int(level) * per_level + int(number)
        place = f"input_blocks.{position + 1}" if row == "down" else f"output_blocks.{position}"
        place = f"{place}.{is_transformer}"
    if kind == "resnets":
        module, _, parameter = inner.rpartition(".")
        inner = f"{_UNET_RESNET[module]}.{parameter}"
    return f"{place}.{inner}"


def map_vae_names(names: Iterable[str]) -> dict[str, str]:
    """Map each parameter of an AutoencoderKL to its name below ``first_stage_model.``."""
    names = list(names)
    levels = {name.split(".")[2] for name in names if name.startswith("decoder.up_blocks.")}
    mapped = {}
    for name in names:
        new = re.sub(
            r"up_blocks\.(\d+)", lambda found: f"up_blocks.{len(levels) - 1 - int(found[1])}", name
        )
        for pattern, replacement in _VAE_RULES:
            new = re.sub(pattern, replacement, new)
        mapped[name] = new
    return mapped


def map_block_names(unet: UNet2DConditionModel) -> dict[int, str]:
    """Map a UNet's transformers by number to their CompVis names, such as ``middle_block.1``."""
    names = map_unet_names(unet.state_dict())
    return {
        block.number: names[f"{block.module}.norm.weight"].removesuffix(".norm.weight")
        for block in list_blocks(unet)
    }


def map_head_names(names: Iterable[str], places: dict[int, str]) -> dict[str, str]:
    """Map each parameter of a ZNet or LDZNet to its name below ``model.diffusion_model.``.

    ``places`` is what ``map_block_names`` returns for the UNet that the head is built on.
    """
    names = list(names)
    start = "unet."
    mapped = {name: name for name in names}  # final.N has its name in both
    inside = map_unet_names(name.removeprefix(start) for name in names if name.startswith(start))
    mapped |= {start + name: new for name, new in inside.items()}
    for name in names:
        if name.startswith("pools."):
            _, number, parameter = name.split(".", 2)
            mapped[name] = f"{places[int(number)]}.attentionpool2D.{parameter}"
    return mapped
