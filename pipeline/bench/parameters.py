"""Parameters of a UNet and of every head built from it, in all and by part."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from models.heads.registry import HEADS
from models.ldm.sd14 import PAPER_LDZNET_PARAMETERS_M, SD14_UNET
from pipeline.spec.blocks import build_empty_unet

HEAD_VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in HEADS),
    ("ldznet", {"fusion": "concatenation"}),
)
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
        with torch.device("meta"):
            head = HEADS[name].from_ldm_config(unet_config, **options)
        counts: Counter[str] = Counter()
        for key, parameter in head.named_parameters():
            counts[_part_of(key)] += parameter.numel()
        paper = PAPER_LDZNET_PARAMETERS_M if is_sd14 and name == "ldznet" and not options else None
        rows.append(_make_row(", ".join([name, *options.values()]), counts, paper))
    return rows


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
