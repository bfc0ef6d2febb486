"""Parameters of a UNet and of every head built from it, in all and by part."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from models.heads.head import Head
from models.heads.inputs import LDMNetwork, describe_inputs
from models.heads.registry import HEADS, find_head_class, find_options_class
from models.ldm.sd14 import SD14_UNET
from pipeline.spec.blocks import build_empty_unet

HEAD_VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in HEADS),
    ("ldznet", {"fusion": "concatenation"}),
)
PAPER_SIZE_PX = 384  # that heads are counted at: attention pools grow with it
PAPER_PARAMETERS_M = {"ldznet": 925}  # millions (LD-ZNet, ICCV 2023, section 4)
PARTS = ("unet", "final", "pools", "added", "stem", "other")


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """Number of parameters of one network: in all, and by part.

    ``unet`` is the LDM's UNet. ``added`` is what the features need: attentions with their norms,
    or the convolutions after a concatenation. ``other`` is a probe's. ``paper_millions`` is the
    figure of the LD-ZNet paper, which is for SD 1.4's UNet; None for other UNets.
    """

    network: str
    total: int
    unet: int
    final: int
    pools: int
    added: int
    stem: int
    other: int
    paper_millions: int | None


def count_parameters(unet_config: Mapping[str, Any]) -> list[ParameterRow]:
    """Count the parameters of an LDM's UNet and of every head built from it, without weights.

    Raises:
        ValueError: a head does not take such a UNet.
    """
    unet = build_empty_unet(unet_config)
    is_sd14 = _architecture(unet) == _architecture(build_empty_unet(SD14_UNET))
    num_unet = sum(parameter.numel() for parameter in unet.parameters())
    rows = [_make_row("LDM's UNet", Counter(unet=num_unet))]
    for name, options in HEAD_VARIANTS:
        network = ", ".join([name, *options.values()])
        with torch.device("meta"):
            head = build_fresh_head(name, unet_config, size_px=PAPER_SIZE_PX, **options)
        counts: Counter[str] = Counter()
        for key, parameter in head.named_parameters():
            counts[_part_of(key)] += parameter.numel()
        paper = PAPER_PARAMETERS_M.get(network) if is_sd14 else None
        rows.append(_make_row(network, counts, paper))
    return rows


def build_fresh_head(
    name: str, unet_config: Mapping[str, Any], *, size_px: int, **options: Any
) -> Head:
    """Build a head afresh for a UNet of this config; ValueError if it takes no such UNet."""
    own = find_options_class(name)(**options)
    inputs = describe_inputs(unet_config, own.list_blocks(), view_px=size_px)
    return find_head_class(name).from_layers(inputs, LDMNetwork(unet_config), own)


def _architecture(unet: UNet2DConditionModel) -> dict[str, Any]:
    """Return a UNet's config with diffusers' defaults, without what changes no layer."""
    plain = json.loads(json.dumps(dict(unet.config)))  # a list and a tuple are the same
    return {k: v for k, v in plain.items() if not k.startswith("_") and k != "sample_size"}


def _part_of(key: str) -> str:
    if any(f".{name}." in key for name in ("attn3", "norm_sd", "merge")):
        return "added"
    first = key.split(".")[0]
    return first if first in PARTS else "other"


def _make_row(network: str, counts: Counter[str], paper: int | None = None) -> ParameterRow:
    parts = {part: counts[part] for part in PARTS}
    return ParameterRow(network, counts.total(), **parts, paper_millions=paper)
