"""What a VAE is trained on: reconstruction, its gradients, and a small divergence from the prior.

Shapes: B images, C channels, H, W pixels, h, w latent positions.
"""

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.nn import functional

LATENT_SIDE = 8  # px that a latent position stands for


@dataclass(frozen=True)
class Comparison:
    """Weights of the terms beside the mean absolute difference, whose weight is 1.

    ``square``: mean squares, PSNR's own measure; they push hardest where most is wrong.
    ``pooled``: mean squares of the difference averaged over squares of 8 px, a latent's own: a
    small VAE would rather keep an edge than a hue, and colours are half of what phrases say.
    ``gradient``: the mean absolute difference of right and lower neighbours' differences (the
    gradient difference loss of Mathieu et al. 2016, alpha 1, signed): edges that are blurred away.
    """

    square: float
    pooled: float
    gradient: float


def compare_images(ours_BCHW: Tensor, theirs_BCHW: Tensor, weights: Comparison) -> Tensor:
    """How far images lie from what they should be, H and W multiples of 8; scalar."""
    difference_BCHW = ours_BCHW - theirs_BCHW
    loss = difference_BCHW.abs().mean() + weights.square * difference_BCHW.square().mean()
    if weights.pooled:
        pooled_BChw = functional.avg_pool2d(difference_BCHW, LATENT_SIDE)
        loss = loss + weights.pooled * pooled_BChw.square().mean()
    if weights.gradient:
        right = difference_BCHW.diff(dim=3).abs().mean()
        down = difference_BCHW.diff(dim=2).abs().mean()
        loss = loss + weights.gradient * 0.5 * (right + down)
    return loss


def measure_divergence(posterior: DiagonalGaussianDistribution) -> Tensor:
    """KL divergence from N(0, 1) in nats, the mean over latent values; scalar.

    Kingma and Welling (2014), appendix B.
    """
    mean_BChw, logvar_BChw = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean_BChw**2 + logvar_BChw.exp() - 1.0 - logvar_BChw).mean()


def measure_psnr(ours_BCHW: Tensor, theirs_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image of range [-1, 1], clamped to it; (B,)."""
    error_B = (ours_BCHW.clamp(-1.0, 1.0) - theirs_BCHW).square().mean(dim=(1, 2, 3))
    return 10.0 * torch.log10(4.0 / error_B.clamp_min(1e-10))
