"""Losses of the UNet against diffusers and by hand, and those of the VAE."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from models.ldm.sd14 import SD14_SCHEDULE
from models.tiny.losses import (
    Noised,
    compare_images,
    draw_timesteps,
    mean_by_bucket,
    measure_divergence,
    measure_psnr,
    predict_error,
    weigh_timesteps,
)
from models.tiny.untrained import build_unet


@pytest.fixture(scope="module")
def schedule():
    return DDPMScheduler.from_config(dict(SD14_SCHEDULE))


def test_noise_is_put_in_as_diffusers_does(schedule):
    generator = torch.Generator().manual_seed(0)
    latent, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    timestep = torch.tensor([0, 500, 999])
    ours = Noised(latent, noise, timestep).add_noise(schedule.alphas_cumprod)
    torch.testing.assert_close(ours, schedule.add_noise(latent, noise, timestep))


def test_timesteps_cover_every_part():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        found = draw_timesteps(10, num_timesteps=1000, generator=generator)
        assert sorted((found // 100).tolist()) == list(range(10))
    many = torch.cat([draw_timesteps(8, num_timesteps=7, generator=generator) for _ in range(100)])
    assert set(many.tolist()) == set(range(7))


def test_weights_are_min_snr(schedule):
    timestep = torch.arange(1000)
    alpha = schedule.alphas_cumprod
    weight = weigh_timesteps(timestep, alpha, gamma=5.0)
    snr = alpha / (1 - alpha)
    torch.testing.assert_close(weight * snr, snr.clamp_max(5.0))
    assert weight[0] < 0.01
    assert (weight[500:] == 1).all()
    assert (weigh_timesteps(timestep, alpha, gamma=None) == 1).all()


def test_a_floor_weighs_what_is_nearly_noise_up(schedule):
    timestep = torch.arange(1000)
    alpha = schedule.alphas_cumprod
    weight = weigh_timesteps(timestep, alpha, gamma=5.0, floor=0.25)
    snr = alpha / (1 - alpha)
    torch.testing.assert_close(weight * snr, snr.clamp(0.25, 5.0))
    assert weight[999] > 50
    middle = (snr > 0.25) & (snr < 5.0)
    torch.testing.assert_close(weight[middle], torch.ones(int(middle.sum())))


def test_means_by_tenth_of_the_timesteps():
    error = torch.tensor([1.0, 3.0, 7.0])
    found = mean_by_bucket(error, torch.tensor([10, 99, 100]), num_timesteps=1000)
    assert {name: float(value) for name, value in found.items()} == {"t0": 2.0, "t100": 7.0}


def test_an_untrained_unet_predicts_nothing_and_learns_from_it(schedule):
    generator = torch.Generator().manual_seed(0)
    latent, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    text = torch.randn(4, 5, 64, generator=generator)
    unet = build_unet(0)
    noised = Noised(latent, noise, torch.tensor([50, 300, 600, 900]))

    def error():
        return predict_error(unet, noised, text, schedule.alphas_cumprod)

    first = error()
    torch.testing.assert_close(first, noise.square().mean(dim=(1, 2, 3)))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for _ in range(5):
        optimizer.zero_grad()
        error().mean().backward()
        optimizer.step()
    assert error().mean() < 0.95 * first.mean()
    assert all(parameter.grad is not None for parameter in unet.parameters())


def test_terms_of_the_comparison():
    theirs = torch.zeros(1, 1, 8, 8)
    ours = theirs.clone()
    ours[0, 0, 0, 0] = 0.5

    def compare(**weights):
        nothing = {"square": 0.0, "pooled": 0.0, "gradient": 0.0}
        return float(compare_images(ours, theirs, **nothing | weights))

    plain = 0.5 / 64
    assert compare() == pytest.approx(plain)
    assert compare(square=2.0) == pytest.approx(plain + 2 * 0.25 / 64)
    assert compare(pooled=3.0) == pytest.approx(plain + 3 * (0.5 / 64) ** 2)
    assert compare(gradient=1.0) == pytest.approx(plain + 0.5 * (0.5 / 56 + 0.5 / 56))


def test_a_shift_of_all_colours_has_no_gradient_term():
    theirs = torch.rand(2, 3, 8, 8)
    both = [
        compare_images(theirs + 0.1, theirs, square=0, pooled=0, gradient=weight)
        for weight in (0.0, 1.0)
    ]
    torch.testing.assert_close(*both)


def test_a_hue_that_is_off_costs_more_than_noise_as_large():
    generator = torch.Generator().manual_seed(0)
    theirs = torch.zeros(1, 3, 16, 16)
    hue, noise = theirs.clone(), torch.randn(theirs.shape, generator=generator).sign() * 0.1
    hue[:, 0], hue[:, 1], hue[:, 2] = 0.1, -0.1, 0.1
    weights = {"square": 5.0, "pooled": 20.0, "gradient": 0.0}
    assert compare_images(hue, theirs, **weights) > 2 * compare_images(noise, theirs, **weights)


def test_divergence_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(2, 8, 3, 3, generator=generator)
    posterior = DiagonalGaussianDistribution(parameters)
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    theirs = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(measure_divergence(posterior), theirs)


def test_psnr():
    theirs = torch.zeros(2, 3, 4, 4)
    ours = theirs.clone()
    ours[0] += 0.2  # a tenth of the range of 2: 20 dB
    ours[1] += 5.0  # clamped to 1: half the range, 6.02 dB
    found = measure_psnr(ours, theirs)
    torch.testing.assert_close(found, torch.tensor([20.0, 6.0206]), atol=1e-3, rtol=0)
