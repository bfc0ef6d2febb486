"""Sizes of the tiny latent diffusion model, whose topology is Stable Diffusion 1.4's.

It has a VAE of factor 8 with 4 channels, a UNet with 16 spatial transformers of 8 heads, and CLIP
text of 77 positions. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.ldm.sd14 import SD14_TEXT, SD14_UNET, SD14_VAE

BUNDLED = Path(__file__).parents[1] / "tiny_ldm_weights"
"""The trained tiny model that comes with the project; its README.md says what it can do."""

_TEXT_WIDTH = 64


@dataclass(frozen=True, slots=True)
class Architecture:
    """The configs of a model's components in diffusers' and transformers' terms."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]


TINY = Architecture(
    # At these widths UNet, VAE and text encoder fit 16 MB in fp16; 32 groups do not divide 24.
    unet=SD14_UNET
    | {
        "block_out_channels": [24, 48, 96, 96],
        "cross_attention_dim": _TEXT_WIDTH,
        "norm_num_groups": 8,
        "sample_size": 16,
    },
    vae=SD14_VAE
    | {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 2, "sample_size": 128},
    text=SD14_TEXT
    | {
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 4 * _TEXT_WIDTH,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "projection_dim": _TEXT_WIDTH,
    },
)
TINY_FEW_HEADS = Architecture({**TINY.unet, "attention_head_dim": 2}, TINY.vae, TINY.text)
"""The architecture of ``BUNDLED``: 2 attention heads of 12, 24 and 48 channels. With SD 1.4's 8, of
3 to 12 channels, a training step takes twice as long on a CPU (0.72 s against 0.35 s for 16 latents
of 16x16)."""
SD14_SIZE = Architecture(SD14_UNET, SD14_VAE, SD14_TEXT)
"""SD 1.4's sizes: 4.3 GB of random float32, for figures that no weight changes."""
