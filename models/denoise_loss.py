"""The denoising loss that Stable Diffusion's UNet is trained with, by timestep.

Shapes: B images, C latent channels, h, w latent positions.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

NUM_BUCKETS = 10  # of equally many timesteps, for figures


@dataclass(frozen=True)
class Noised:
    """A batch of x_t = sqrt(ᾱ_t)·z + sqrt(1-ᾱ_t)·ε (Ho et al. 2020, equation 4), with its parts.

    ``latent_BChw`` is scaled z and ``noise_BChw`` ε, float32; ``timestep_B`` int64.
    """

    latent_BChw: Tensor
    noise_BChw: Tensor
    timestep_B: Tensor

    def mix(self, alphas_cumprod: Tensor) -> Tensor:
        """x_t (B, C, h, w) for a schedule's ᾱ (T,)."""
        alpha_B111 = alphas_cumprod[self.timestep_B][:, None, None, None]
        return alpha_B111.sqrt() * self.latent_BChw + (1.0 - alpha_B111).sqrt() * self.noise_BChw


def draw_timesteps(num: int, *, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """One timestep in each of ``num`` equal parts of [0, num_timesteps), shuffled; int64 (num,).

    Each is uniform over all, and a batch always covers them all: the loss varies less from batch to
    batch than with independent draws (Kingma et al. 2021, appendix I.1).
    """
    parts = torch.randperm(num, generator=generator).double()
    within = torch.rand(num, generator=generator, dtype=torch.float64)
    return ((parts + within) / num * num_timesteps).long().clamp_max(num_timesteps - 1)


def predict_error(
    unet: UNet2DConditionModel, noised: Noised, text_BTD: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """Mean squared error of the UNet's ε of each image, float32 (B,)."""
    x_BChw = noised.mix(alphas_cumprod)
    ours_BChw = unet(x_BChw, noised.timestep_B, text_BTD).sample.float()
    return (ours_BChw - noised.noise_BChw).square().mean(dim=(1, 2, 3))


def weigh_timesteps(
    timestep_B: Tensor, alphas_cumprod: Tensor, *, gamma: float | None, floor: float | None = None
) -> Tensor:
    """Weights for a UNet that predicts ε: SNR clamped to [floor, gamma], over SNR; float32 (B,).

    ``gamma`` is Min-SNR weighting's (Hang et al. 2023, section 3.4): at small timesteps, where
    hardly any noise is to be found, a plain mean would spend the model on details; there SNR is
    over gamma. ``floor`` does the same at the other end, as truncated SNR weighting (Salimans and
    Ho 2022, section 4): the error of ε is SNR times that of z, so that where little but noise is
    left, a wrong layout all but vanishes from a plain mean. None: no such bound.
    """
    alpha_B = alphas_cumprod[timestep_B]
    snr_B = alpha_B / (1.0 - alpha_B)
    return (snr_B.clamp(floor or 0.0, math.inf if gamma is None else gamma) / snr_B).float()


def mean_by_bucket(error_B: Tensor, timestep_B: Tensor, *, num_timesteps: int) -> dict[str, Tensor]:
    """Mean error by tenth of the timesteps, of those that the batch has: ``t0``, ``t100`` …."""
    bucket_B = timestep_B * NUM_BUCKETS // num_timesteps
    return {
        f"t{bucket * num_timesteps // NUM_BUCKETS}": error_B[bucket_B == bucket].mean()
        for bucket in sorted(set(bucket_B.tolist()))
    }
