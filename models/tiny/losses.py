"""Losses and figures of the tiny model's training: first the UNet's, then the VAE's.

Shapes: B images, C latent channels, h, w latent positions.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.nn import functional

from models.ldm.unet_config import LATENT_DOWNSCALE

NUM_BUCKETS = 10  # of equally many timesteps, for figures


@dataclass(frozen=True)
class Noised:
    """Latents with their noise: scaled z and ε (B, C, h, w) float32, and timesteps (B,) int64."""

    latent_BChw: Tensor
    noise_BChw: Tensor
    timestep_B: Tensor

    def add_noise(self, alphas_cumprod: Tensor) -> Tensor:
        """Return x_t = sqrt(ᾱ_t)·z + sqrt(1-ᾱ_t)·ε for ᾱ (T,): Ho et al. 2020, equation 4."""
        alpha_B111 = alphas_cumprod[self.timestep_B][:, None, None, None]
        return alpha_B111.sqrt() * self.latent_BChw + (1.0 - alpha_B111).sqrt() * self.noise_BChw


def draw_timesteps(num: int, *, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """Draw a timestep in each of ``num`` equal parts of [0, num_timesteps), shuffled; int64.

    Each is uniform over all, and a batch always covers them all: the loss varies less from batch to
    batch than with independent draws (Kingma et al. 2021, appendix I.1).
    """
    parts = torch.randperm(num, generator=generator).double()
    within = torch.rand(num, generator=generator, dtype=torch.float64)
    return ((parts + within) / num * num_timesteps).long().clamp_max(num_timesteps - 1)


def predict_error(
    unet: UNet2DConditionModel, noised: Noised, text_BTD: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """Return the mean squared error of the UNet's ε of each image, float32 (B,)."""
    x_BChw = noised.add_noise(alphas_cumprod)
    ours_BChw = unet(x_BChw, noised.timestep_B, text_BTD).sample.float()
    return (ours_BChw - noised.noise_BChw).square().mean(dim=(1, 2, 3))


def weigh_timesteps(
    timestep_B: Tensor, alphas_cumprod: Tensor, *, gamma: float | None, floor: float | None = None
) -> Tensor:
    """Return loss weights of a UNet that predicts ε: SNR clamped to [floor, gamma] over SNR; (B,).

    ``gamma`` is that of Min-SNR weighting (Hang et al. 2023, section 3.4): it lowers the weight of
    small timesteps, where a plain mean would spend the model on details. ``floor`` raises that of
    large ones, as truncated SNR weighting does (Salimans and Ho 2022, section 4): the error of ε is
    SNR times that of z, so that where little but noise is left, a plain mean hardly sees a wrong
    layout. None: no such bound.
    """
    alpha_B = alphas_cumprod[timestep_B]
    snr_B = alpha_B / (1.0 - alpha_B)
    return (snr_B.clamp(floor or 0.0, math.inf if gamma is None else gamma) / snr_B).float()


def mean_by_bucket(error_B: Tensor, timestep_B: Tensor, *, num_timesteps: int) -> dict[str, Tensor]:
    """Return the mean error in each tenth of the timesteps: ``t0``, ``t100`` …, if it has any."""
    bucket_B = timestep_B * NUM_BUCKETS // num_timesteps
    return {
        f"t{bucket * num_timesteps // NUM_BUCKETS}": error_B[bucket_B == bucket].mean()
        for bucket in sorted(set(bucket_B.tolist()))
    }


def compare_images(
    ours_BCHW: Tensor, theirs_BCHW: Tensor, *, square: float, pooled: float, gradient: float
) -> Tensor:
    """Return the reconstruction loss of images, H and W multiples of 8; a scalar.

    It is the mean absolute difference, and three more terms by their weights:
    ``square``: mean squares, PSNR's own measure; they push hardest where most is wrong.
    ``pooled``: mean squares of the difference averaged over squares of 8 px, a latent's own: a
    small VAE would rather keep an edge than a hue, and colours are half of what phrases say.
    ``gradient``: the mean absolute difference of right and lower neighbours' differences (the
    gradient difference loss of Mathieu et al. 2016, alpha 1, signed): edges that are blurred away.
    """
    difference_BCHW = ours_BCHW - theirs_BCHW
    loss = difference_BCHW.abs().mean() + square * difference_BCHW.square().mean()
    if pooled:
        pooled_BChw = functional.avg_pool2d(difference_BCHW, LATENT_DOWNSCALE)
        loss = loss + pooled * pooled_BChw.square().mean()
    if gradient:
        right = difference_BCHW.diff(dim=3).abs().mean()
        down = difference_BCHW.diff(dim=2).abs().mean()
        loss = loss + gradient * 0.5 * (right + down)
    return loss


def measure_divergence(posterior: DiagonalGaussianDistribution) -> Tensor:
    """Return the KL divergence from N(0, 1) in nats, the mean over latent values; a scalar.

    Kingma and Welling (2014), appendix B.
    """
    mean_BChw, logvar_BChw = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean_BChw**2 + logvar_BChw.exp() - 1.0 - logvar_BChw).mean()


def measure_psnr(ours_BCHW: Tensor, theirs_BCHW: Tensor) -> Tensor:
    """Return the PSNR in dB of each image, of range [-1, 1] and clamped to it; (B,)."""
    error_B = (ours_BCHW.clamp(-1.0, 1.0) - theirs_BCHW).square().mean(dim=(1, 2, 3))
    return 10.0 * torch.log10(4.0 / error_B.clamp_min(1e-10))
