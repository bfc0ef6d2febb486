"""The tiny latent diffusion model as training starts from it.

``models.tiny_ldm`` draws weights such that a signal gets through an *untrained* model. Training
starts elsewhere: with what diffusers and transformers leave (torch's own initialisation of
convolutions and linear layers, CLIP's of the text encoder), but for these: every residual
branch of the UNet ends in zeros, and so does its last convolution, as CompVis' ``zero_module`` has
it, so that it starts as the identity and predicts 0; the VAE's encoder does start from those drawn
weights, which keep the colour of a place: from torch's, 3,300 steps found luminance and red against
blue, but nothing of green against magenta (R² -0.1 of a linear readout from the latents), so that
purple was blue and pink was white; and the posterior starts narrow, so that the decoder sees the
mean from the first step on.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from models.tiny_ldm import TINY, Architecture, draw_weights

_FIRST_LOGVAR = -5.0
_BRANCH_ENDS = (".conv2", ".proj_out")


def build_vae(seed: int, architecture: Architecture = TINY) -> AutoencoderKL:
    """A VAE to train."""
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_config(dict(architecture.vae))
    drawn = AutoencoderKL.from_config(dict(architecture.vae))
    draw_weights(drawn, seed=seed, name="vae")
    vae.encoder.load_state_dict(drawn.encoder.state_dict())
    vae.quant_conv.load_state_dict(drawn.quant_conv.state_dict())
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.latent_channels :] = _FIRST_LOGVAR
    return vae


def build_unet(seed: int, architecture: Architecture = TINY) -> UNet2DConditionModel:
    """A UNet to train."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_config(dict(architecture.unet))
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    for name, module in unet.named_modules():
        if name.endswith(_BRANCH_ENDS):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def build_text_encoder(seed: int, config: Mapping[str, Any]) -> CLIPTextModel:
    """A text encoder to train; ``config`` as ``models.tiny_ldm.build_text_config`` makes it."""
    torch.manual_seed(seed)
    return CLIPTextModel(CLIPTextConfig(**config))
