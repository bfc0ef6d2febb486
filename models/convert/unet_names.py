"""CompVis names of a Stable Diffusion UNet, or of LD-ZNet's head, and what stands for them here.

CompVis numbers a UNet's stages in one row: ``input_blocks.N.M``, ``middle_block.M``,
``output_blocks.N.M``. diffusers sorts them by level. Where a level ends, how many residual blocks
it has and which have a transformer is read off the names, so any number of levels, any width and
both kinds of projections (convolutions in SD 1, linear layers in SD 2) convert.

"Name" is here a parameter's name below ``model.diffusion_model.`` of a checkpoint.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

NORM_GROUPS = 32
"""Groups of every group norm in CompVis's UNet; not in the weights."""

HEAD_LEVEL = ("pools.", "final.")
"""How those new names start that belong to a head, beside its UNet; no UNet has such a name."""

_NUM_NAMED = 5
_STAGE = re.compile(r"(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.(\d+)\.(.+)")
_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    **{f"final.{i}": f"final.{i}" for i in range(0, 13, 2)},
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
# What a transformer holds has the same names in both, LD-ZNet's norm_sd and attn3 included.
_TRANSFORMER = re.compile(
    r"(norm|proj_in|proj_out)\.(weight|bias)|transformer_blocks\.0\.("
    r"attn[123]\.(to_[qkv]\.weight|to_out\.0\.(weight|bias))|"
    r"(norm[123]|norm_sd|ff\.net\.0\.proj|ff\.net\.2)\.(weight|bias))"
)
_POOL = re.compile(r"attentionpool2D\.(positional_embedding|(qkv|c)_proj\.(weight|bias))")
_PARAMETER = re.compile(r"(?:(.+)\.)?(weight|bias)")
_KINDS = {
    **dict.fromkeys(("in_layers", "emb_layers", "out_layers", "skip_connection"), "resnet"),
    **dict.fromkeys(("norm", "proj_in", "proj_out", "transformer_blocks"), "transformer"),
    "attentionpool2D": "transformer",
    "op": "downsampler",
    "conv": "upsampler",
    "weight": "conv",
    "bias": "conv",
}
_RESIDUAL = (("resnet",), ("resnet", "transformer"))


class ConversionError(ValueError):
    """A checkpoint that cannot be converted whole."""


@dataclass(frozen=True, slots=True)
class _Topology:
    """A UNet's stages: CompVis module to (diffusers module, kind) in forward order."""

    modules: Mapping[str, tuple[str, str]]
    num_layers: int
    attends: tuple[bool, ...]

    def block_numbers(self) -> dict[str, int]:
        """Number the transformers in forward order from 1, as LD-ZNet's paper does."""
        places = [place for place, (_, kind) in self.modules.items() if kind == "transformer"]
        return {place: number for number, place in enumerate(places, start=1)}


def list_some(names: Iterable[str]) -> str:
    """Write the first few names and how many there are, for an error."""
    found = sorted(names)
    more = f" and {len(found) - _NUM_NAMED} more" if len(found) > _NUM_NAMED else ""
    return ", ".join(found[:_NUM_NAMED]) + more


def rename_unet(names: Iterable[str]) -> dict[str, str]:
    """Map each CompVis name to diffusers' UNet2DConditionModel name, or to a head's.

    LD-ZNet's added attentions keep their names inside the transformer
    (``….transformer_blocks.0.attn3.…``, ``….norm_sd.…``). What a head holds beside its UNet starts
    with one of HEAD_LEVEL: ``pools.<block number>.…`` for ``….attentionpool2D.…``, and ``final.…``.
    A plain SD UNet has neither.

    Raises:
        ConversionError: a name that is not accounted for, or stages that make no such UNet.
    """
    names = list(names)
    topology = _read_topology(names)
    numbers = topology.block_numbers()
    renamed = {name: _rename(name, topology, numbers) for name in names}
    unknown = [name for name, new in renamed.items() if new is None]
    if unknown:
        raise _unknown_names(unknown)
    return {name: new for name, new in renamed.items() if new is not None}


def read_unet_config(
    state: Mapping[str, Tensor], *, num_heads: int | Sequence[int] = 8
) -> dict[str, Any]:
    """Read a UNet's config, diffusers' UNet2DConditionModel, off its weights by CompVis name.

    Args:
        state: name to weight, as ``prefer_ema`` returns them.
        num_heads: attention heads, one number or one a level; not in the weights. SD 1.x has 8,
            SD 2.x heads of 64 channels: 5, 10, 20, 20.

    Raises:
        ConversionError: as rename_unet; a weight without which the config is unknown is absent or
            of other dimensions; or the heads do not divide a width.
    """
    topology = _read_topology(list(state))
    num_levels = len(topology.attends)
    levels = [f"input_blocks.{1 + i * (topology.num_layers + 1)}.0" for i in range(num_levels)]
    text = _weight(state, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)
    heads = num_heads if isinstance(num_heads, int) else list(num_heads)
    widths = [_weight(state, f"{level}.in_layers.2.weight", 4).shape[0] for level in levels]
    _check_heads(heads, widths, attends=topology.attends)
    return {
        "act_fn": "silu",
        # diffusers' name for the number of heads: https://github.com/huggingface/diffusers/issues/2011
        "attention_head_dim": heads,
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": text.shape[1],
        "down_block_types": [
            "CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in topology.attends
        ],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": _weight(state, "input_blocks.0.0.weight", 4).shape[1],
        "layers_per_block": topology.num_layers,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": NORM_GROUPS,
        "out_channels": _weight(state, "out.2.weight", 4).shape[0],
        "up_block_types": [
            "CrossAttnUpBlock2D" if attends else "UpBlock2D"
            for attends in reversed(topology.attends)
        ],
        "use_linear_projection": _weight(state, "middle_block.1.proj_in.weight", 2, 4).ndim == 2,
    }


def _weight(state: Mapping[str, Tensor], name: str, *ndims: int) -> Tensor:
    if name not in state:
        raise ConversionError(f"UNet: expected a weight {name}, got none; is the file whole?")
    if state[name].ndim not in ndims:
        raise ConversionError(
            f"UNet: {name} must have {' or '.join(map(str, ndims))} dimensions, got shape "
            f"{tuple(state[name].shape)}"
        )
    return state[name]


def _check_heads(
    num_heads: int | Sequence[int], widths: Sequence[int], *, attends: Sequence[bool]
) -> None:
    heads = [num_heads] * len(widths) if isinstance(num_heads, int) else list(num_heads)
    if len(heads) != len(widths):
        raise ConversionError(f"UNet: expected heads for {len(widths)} levels, got {heads}")
    used = (*attends[:-1], True)  # the middle has the last level's width, and always attends
    for number, width, attend in zip(heads, widths, used, strict=True):
        if number < 1 or (attend and width % number):
            raise ConversionError(
                f"UNet: {number} attention heads do not divide its width {width}; give the "
                "number it was trained with by --num-heads (Stable Diffusion 1.x: 8)"
            )


def _rename(name: str, topology: _Topology, numbers: Mapping[str, int]) -> str | None:
    """Return the new name, or None for one that is not accounted for."""
    stage = _STAGE.fullmatch(name)
    if stage is None:
        parameter = _PARAMETER.fullmatch(name)
        new = _TOP.get(parameter[1]) if parameter else None
        return f"{new}.{parameter[2]}" if parameter and new else None
    place, inner = f"{stage[1]}.{stage[2]}", stage[3]
    module, kind = topology.modules[place]
    if kind == "transformer":
        if _POOL.fullmatch(inner):
            return f"pools.{numbers[place]}.{inner.removeprefix('attentionpool2D.')}"
        return f"{module}.{inner}" if _TRANSFORMER.fullmatch(inner) else None
    parameter = _PARAMETER.fullmatch(inner)
    if parameter is None:
        return None
    if kind == "conv":
        return f"{module}.{inner}" if parameter[1] is None else None
    known = {"resnet": _RESNET, "downsampler": {"op": "conv"}, "upsampler": {"conv": "conv"}}
    new = known[kind].get(parameter[1])
    return f"{module}.{new}.{parameter[2]}" if new else None


def _unknown_names(names: Iterable[str]) -> ConversionError:
    names = list(names)
    note = ""
    if any(name.startswith("label_emb") for name in names):
        note = "; class-conditional UNets (label_emb) are not converted"
    return ConversionError(
        f"UNet: expected the names of an SD UNet or an LD-ZNet head, got {list_some(names)}{note}"
    )


def _list_stages(names: Iterable[str]) -> dict[str, list[tuple[str, ...]]]:
    """Return the kinds of modules in each stage: ``{"input_blocks": [("conv",), …], …}``."""
    kinds: dict[str, dict[int, dict[int, str]]] = {}
    for name in names:
        found = _STAGE.fullmatch(name)
        if found is None:
            continue
        row, _, number = found[1].partition(".")
        kind = _KINDS.get(found[3].split(".")[0])
        stage = kinds.setdefault(row, {}).setdefault(int(number or 0), {})
        if kind is None or stage.setdefault(int(found[2]), kind) != kind:
            raise _unknown_names([name])
    stages = {}
    for row in ("input_blocks", "middle_block", "output_blocks"):
        rows = kinds.get(row, {})
        gaps = [f"{row}.{i}" for i in range(max(rows, default=0) + 1) if i not in rows]
        if gaps:
            raise ConversionError(f"UNet: expected {list_some(gaps)}, got no weight of it")
        stages[row] = [
            tuple(places.get(i, "nothing") for i in range(max(places) + 1))
            for _, places in sorted(rows.items())
        ]
    return stages


def _read_topology(names: Sequence[str]) -> _Topology:
    stages = _list_stages(names)
    modules: dict[str, tuple[str, str]] = {}
    levels = _walk_down(stages["input_blocks"], modules)
    num_layers = len(levels[0])
    if not num_layers or any(level != level[:1] * num_layers for level in levels):
        raise ConversionError(
            "UNet: expected residual blocks alike within a level, and as many in each, got "
            f"{levels} in input_blocks"
        )
    attends = tuple(level[0] == _RESIDUAL[1] for level in levels)
    middle = stages["middle_block"][0]
    if middle != ("resnet", "transformer", "resnet"):
        raise ConversionError(f"middle_block: expected resnet, transformer, resnet, got {middle}")
    for i, module in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        modules[f"middle_block.{i}"] = (f"mid_block.{module}", middle[i])
    _walk_up(stages["output_blocks"], modules, num_layers=num_layers, attends=attends)
    return _Topology(modules=modules, num_layers=num_layers, attends=attends)


def _walk_down(
    stages: Sequence[tuple[str, ...]], modules: dict[str, tuple[str, str]]
) -> list[list[tuple[str, ...]]]:
    """Fill in ``input_blocks``; return each level's residual blocks: a downsampler ends a level."""
    levels: list[list[tuple[str, ...]]] = [[]]
    modules["input_blocks.0.0"] = ("conv_in", "conv")
    for number, kinds in enumerate(stages):
        place, stage = f"input_blocks.{number}", f"down_blocks.{len(levels) - 1}"
        if number > 0 and kinds == ("downsampler",) and levels[-1]:
            modules[f"{place}.0"] = (f"{stage}.downsamplers.0", "downsampler")
            levels.append([])
        elif number > 0 and kinds in _RESIDUAL:
            position = len(levels[-1])
            for i, module in enumerate(("resnets", "attentions")[: len(kinds)]):
                modules[f"{place}.{i}"] = (f"{stage}.{module}.{position}", kinds[i])
            levels[-1].append(kinds)
        elif number > 0 or kinds != ("conv",):
            raise ConversionError(
                f"{place}: expected a first convolution, then residual blocks and downsamplers, "
                f"got {kinds}"
            )
    return levels


def _walk_up(
    stages: Sequence[tuple[str, ...]],
    modules: dict[str, tuple[str, str]],
    *,
    num_layers: int,
    attends: Sequence[bool],
) -> None:
    """Fill in ``output_blocks``: one residual block a level more than down, then an upsampler."""
    num_levels = len(attends)
    if len(stages) != num_levels * (num_layers + 1):
        raise ConversionError(
            f"output_blocks: expected {num_levels} levels of {num_layers + 1}, got {len(stages)}"
        )
    for number, kinds in enumerate(stages):
        level, position = divmod(number, num_layers + 1)
        expected = _RESIDUAL[attends[num_levels - 1 - level]]
        if position == num_layers and level < num_levels - 1:
            expected = (*expected, "upsampler")
        if kinds != expected:
            raise ConversionError(f"output_blocks.{number}: expected {expected}, got {kinds}")
        names = {"resnet": f"resnets.{position}", "transformer": f"attentions.{position}"}
        for i, kind in enumerate(kinds):
            module = names.get(kind, "upsamplers.0")
            modules[f"output_blocks.{number}.{i}"] = (f"up_blocks.{level}.{module}", kind)
