"""Converts the head in LD-ZNet's published checkpoint to one of ours.

The weights alone tell which head it is, which blocks it reads and the image side that its attention
pools are learned for.
"""

from collections.abc import Mapping
from math import isqrt

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from models.convert.check_weights import match_weights, unify_dtype
from models.convert.configs import read_unet_config
from models.convert.ldm import build_empty
from models.convert.names import ConversionError, map_block_names, map_head_names
from models.convert.sort_keys import HEAD_PREFIX, UNET_PREFIX, SortedState
from models.heads.ldznet import LDZNet
from models.heads.znet import ZNet
from models.ldm.blocks import Block, feature_shape, list_blocks
from models.ldm.unet_config import LATENT_DOWNSCALE

_ADDED = (".attn3.", ".norm_sd.", ".attentionpool2D.")
_EMBEDDING = "attentionpool2D.positional_embedding"


def convert_head(
    state: SortedState, *, num_heads: int = 8, dtype: torch.dtype | None = None
) -> LDZNet | ZNet:
    """Convert the head of a published LD-ZNet or ZNet checkpoint, and enter it in its account.

    It is an LD-ZNet where some block has the added attention, else a ZNet. The weights are the EMA
    copies where the checkpoint has them, as the published code predicts.

    Args:
        state: the checkpoint's tensors, sorted.
        num_heads: attention heads of the UNet, not in the weights; 8 in SD 1.x.
        dtype: of the head; default the checkpoint's widest.

    Returns:
        The head on the CPU, in one dtype, in training mode. It shares the checkpoint's memory where
        that is of its dtype.

    Raises:
        ConversionError: a weight that is missing, unknown, of another shape or no finite float,
            heads that do not divide a width, or an image side that the blocks do not agree on.
    """
    if "head" not in state.keys:
        raise ConversionError(
            f"checkpoint: expected a head's weights {HEAD_PREFIX}…, got none; a plain LDM is no "
            "head"
        )
    weights = state.select_weights("head")
    config = read_unet_config(weights, num_heads=num_heads)
    # A head's config is that of its LDM's UNet, which predicts noise of the latent's channels.
    config["out_channels"] = config["in_channels"]
    del config["sample_size"]
    unet = build_empty("head", UNet2DConditionModel, config)
    places = map_block_names(unet)
    head: LDZNet | ZNet
    with torch.device("meta"):  # no memory or time for weights that are replaced
        if any(part in name for part in _ADDED for name in weights):
            grids = _read_grids(
                weights, {block: places[block.number] for block in list_blocks(unet)}
            )
            blocks = [block.number for block in grids]
            head = LDZNet(unet_config=config, blocks=blocks, size_px=_read_size_px(grids))
        else:
            head = ZNet(unet_config=config)
    names = map_head_names(head.state_dict(), places)
    where = f"head ({type(head).__name__})"
    matched = match_weights(weights, head, names, where=where, prefix=UNET_PREFIX)
    matched, note = unify_dtype(matched, dtype)
    state.account.add_note("head", note)
    head.load_state_dict(matched, assign=True)
    return head


def _read_grids(weights: Mapping[str, Tensor], places: Mapping[Block, str]) -> dict[Block, int]:
    """Return the side of each pool's square grid: its embedding is (channels, side² + 1)."""
    grids = {}
    for block, place in places.items():
        name = f"{place}.{_EMBEDDING}"
        if name not in weights:
            continue
        num_tokens = weights[name].shape[-1]
        side = isqrt(max(num_tokens - 1, 0))
        if side == 0 or side**2 + 1 != num_tokens:
            raise ConversionError(
                f"{UNET_PREFIX}{name}: expected a square grid's tokens and their mean, got "
                f"{num_tokens} tokens"
            )
        grids[block] = side
    if not grids:
        raise ConversionError("LD-ZNet: expected an attention pool where there is attn3, got none")
    return grids


def _read_size_px(grids: Mapping[Block, int]) -> int:
    """Return the image side in px that all pools are learned for."""
    finest = min(grids, key=lambda block: block.downscale)
    side = grids[finest] * finest.downscale
    wrong = [b for b in grids if feature_shape(b, (side, side))[1:] != (grids[b], grids[b])]
    if wrong or side * LATENT_DOWNSCALE % 64:
        sides = {block.number: grids[block] * block.downscale * LATENT_DOWNSCALE for block in grids}
        raise ConversionError(
            "LD-ZNet: expected attention pools learned for one image side, a multiple of 64 px, "
            f"got sides by block {sides}"
        )
    return side * LATENT_DOWNSCALE
