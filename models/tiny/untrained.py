"""Weights that the training of the tiny latent diffusion model starts from.

UNet and text encoder start as diffusers and transformers initialise them, but with zeros at the end
of every residual branch of the UNet and in its last convolution, as CompVis's ``zero_module`` does.

The VAE starts as a map of colours. Its encoder has the weights of ``models.tiny.write``, which keep
the colour of a place; its decoder's branches end in zeros; the last convolution of each is fitted
by least squares, to the colour of 8 px squares and to the pixels: 20 dB before the first step.
From torch's own weights, 3,300 steps found luminance and red against blue, but no green against
magenta: purple came out blue and pink white.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from models.tiny.architecture import TINY_FEW_HEADS
from models.tiny.write import draw_weights

_FIRST_LOGVAR = -5.0  # of the posterior
_RIDGE = 1e-4  # of the least squares, per row


def build_vae(seed: int) -> AutoencoderKL:
    """Build a VAE to train, before ``fit_colours``; its posterior starts narrow."""
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_config(dict(TINY_FEW_HEADS.vae))
    drawn = AutoencoderKL.from_config(dict(TINY_FEW_HEADS.vae))
    draw_weights(drawn, seed=seed, name="vae")
    vae.encoder.load_state_dict(drawn.encoder.state_dict())
    num = vae.config.latent_channels
    with torch.no_grad():
        nn.init.dirac_(vae.post_quant_conv.weight)
        nn.init.zeros_(vae.post_quant_conv.bias)
        nn.init.dirac_(vae.quant_conv.weight[:num])
        nn.init.zeros_(vae.quant_conv.weight[num:])
        nn.init.zeros_(vae.quant_conv.bias[:num])
        vae.quant_conv.bias[num:] = _FIRST_LOGVAR
    _zero_layers(vae.decoder, (".conv2", ".to_out.0"))
    for name, module in vae.decoder.named_modules():
        if name.endswith("upsamplers.0.conv"):
            nn.init.dirac_(module.weight)
    return vae


def _zero_layers(network: nn.Module, endings: tuple[str, ...]) -> None:
    for name, layer in network.named_modules():
        if name.endswith(endings):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def fit_colours(vae: AutoencoderKL, pixels_BCHW: Tensor) -> None:
    """Fit the last convolutions of encoder and decoder to images, in place, by least squares.

    ``pixels_BCHW`` (B, 3, H, W) float32 in [-1, 1], some tens of images. Three latent channels then
    are luminance, red against blue and green against magenta of 8 px squares, to unit variance.
    """
    colour_BChw = functional.avg_pool2d(pixels_BCHW, 8)
    red, green, blue = colour_BChw.unbind(1)
    axes = torch.stack([(red + green + blue) / 3, (red - blue) / 2, green - (red + blue) / 2], -1)
    target = axes.reshape(-1, 3)
    target = (target - target.mean(0)) / target.std(0)
    features: list[Tensor] = []
    with vae.encoder.conv_act.register_forward_hook(lambda *call: features.append(call[-1])):
        vae.encode(pixels_BCHW)
    _fit_last(vae.encoder.conv_out, features.pop(), target)
    latent_BChw = vae.encode(pixels_BCHW).latent_dist.mean
    with vae.decoder.conv_act.register_forward_hook(lambda *call: features.append(call[-1])):
        vae.decode(latent_BChw)
    _fit_last(vae.decoder.conv_out, features.pop(), pixels_BCHW.permute(0, 2, 3, 1).reshape(-1, 3))


def _fit_last(convolution: nn.Conv2d, features_BCHW: Tensor, target: Tensor) -> None:
    """Fit the first outputs of a convolution to ``target`` (N, n) by least squares, in float64.

    Only the centres of its windows get weights.
    """
    rows = features_BCHW.permute(0, 2, 3, 1).reshape(len(target), -1).double()
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    ridge = _RIDGE * len(rows) * torch.eye(rows.shape[1], dtype=rows.dtype)
    weight = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ target.double()).float()
    assert convolution.bias is not None
    num, middle = target.shape[1], convolution.weight.shape[-1] // 2
    convolution.weight[:num] = 0.0
    convolution.weight[:num, :, middle, middle] = weight[:-1].T
    convolution.bias[:num] = weight[-1]


def build_unet(seed: int) -> UNet2DConditionModel:
    """Build a UNet to train: each residual block starts as the identity, and it predicts 0."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_config(dict(TINY_FEW_HEADS.unet))
    _zero_layers(unet, (".conv2", ".proj_out", "conv_out"))
    return unet


def build_text_encoder(seed: int, config: Mapping[str, Any]) -> CLIPTextModel:
    """Build a text encoder to train; ``config`` is what ``write_words`` returned."""
    torch.manual_seed(seed)
    return CLIPTextModel(CLIPTextConfig(**config))
