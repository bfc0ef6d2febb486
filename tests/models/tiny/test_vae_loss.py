import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from models.tiny.losses import compare_images, measure_divergence, measure_psnr


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
