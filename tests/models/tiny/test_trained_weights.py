"""The trained model that comes with the project loads everywhere and does what its card says."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from models.ldm.encoders import FeatureEncoder, LatentEncoder
from models.tiny.architecture import BUNDLED
from models.tiny.losses import measure_psnr
from pipeline.pretrain.corpus import CAPTION_WORDS
from pipeline.scenes.scene import draw_scene, list_words


@pytest.fixture(scope="module")
def images():
    return np.stack([draw_scene(seed=0, split="val", index=i).image for i in range(6)])


def test_it_is_small_and_has_its_card():
    sizes = [path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(sizes) <= 16_000_000
    figures = json.loads((BUNDLED / "figures.json").read_text())
    card = (BUNDLED / "README.md").read_text()
    assert f"| standard | {figures['psnr_dB']['standard']:.1f} | yes |" in card
    assert "## What it gets wrong" in card
    assert "Nobody has looked" not in card


def test_plain_diffusers_loads_it():
    pipeline = StableDiffusionPipeline.from_pretrained(BUNDLED, safety_checker=None)
    for word in (*list_words(), *CAPTION_WORDS):
        assert len(pipeline.tokenizer(word).input_ids) == 3  # one token between start and end


def test_it_rebuilds_scenes_and_keeps_their_hues(images):
    ours = LatentEncoder.from_pretrained(BUNDLED)
    mean, _ = ours.encode_image(torch.from_numpy(images))
    assert 0.8 < float(mean.std()) * ours.scaling_factor < 1.25
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        rebuilt = ours.vae.decode(mean).sample
    assert measure_psnr(rebuilt, pixels).mean() > 19
    for first, second in ((0, 2), (0, 1), (1, 2)):  # red to blue, red to green, green to blue
        hue, kept = (x[:, first] - x[:, second] for x in (pixels, rebuilt))
        assert torch.corrcoef(torch.stack([hue.flatten(), kept.flatten()]))[0, 1] > 0.8


def test_its_unet_finds_noise_and_hears_the_prompt(images):
    ours = LatentEncoder.from_pretrained(BUNDLED)
    latent = ours.encode_image(torch.from_numpy(images))[0] * ours.scaling_factor
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    features = FeatureEncoder.from_pretrained(BUNDLED, blocks=(8,))
    timestep = torch.full((len(latent),), 400)
    alpha = features.alphas_cumprod[400].float()
    noised = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
    predicted = {}
    for colour in ("red", "blue"):
        text = ours.encode_text([f"a photo of a {colour} circle."] * len(latent)).tokens
        with torch.inference_mode():
            predicted[colour] = features.unet(noised, timestep, text).sample
    assert (predicted["red"] - noise).square().mean() < 0.25
    assert (predicted["red"] - predicted["blue"]).square().mean() > 1e-5
