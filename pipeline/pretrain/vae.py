"""Training the tiny VAE on crops of scenes.

Data flow: tars -> one uint8 file of all images, mapped -> scenes in the epoch's order -> a random
crop, or the whole scene shrunk -> reconstruction.
"""

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from models.tiny.losses import Comparison, compare_images, measure_divergence, measure_psnr
from models.tiny.untrained import build_vae, fit_colours
from pipeline.base.whole_file import open_whole
from pipeline.pretrain.config import PretrainConfig, VaeConfig
from pipeline.pretrain.loop import Losses, PretrainLoop, find_device
from pipeline.read.order import shuffle_positions

STAGE = "vae"
_SCORED = 96  # validation scenes at each validation
_SCORED_AT_ONCE = 16
_FITTED = 16  # training scenes that the VAE's start is fitted to


def cache_images(tars: Sequence[Path], path: Path, *, size: int) -> np.ndarray:
    """Decode every JPEG of some tars, in order, into a file; return it mapped: (N, H, W, 3) uint8.

    A file that is there already is taken as it is; it appears under its name when it is whole.
    """
    if not path.exists():
        images = [image for tar in tars for image in _read_images(tar, size)]
        with open_whole(path) as file:
            np.save(file, np.stack(images))
    mapped: np.ndarray = np.load(path, mmap_mode="r")
    return mapped


def _read_images(path: Path, size: int) -> list[np.ndarray]:
    images = []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                data = tar.extractfile(member)
                assert data is not None
                image = np.asarray(Image.open(data).convert("RGB"))
                assert image.shape == (size, size, 3), (path, member.name, image.shape)
                images.append(image)
    return images


def read_crops(images_NHWC: np.ndarray, config: VaeConfig, step: int) -> Tensor:
    """The crops of a step: (B, 3, crop, crop) float32 in [-1, 1]."""
    num, side = images_NHWC.shape[:2]
    places = np.arange(step * config.batch_size, (step + 1) * config.batch_size)
    rng = np.random.Generator(np.random.PCG64([config.seed, step]))
    crops = []
    for epoch, position in zip(places // num, places % num, strict=True):
        order = shuffle_positions(np.array([position]), num=num, seed=config.seed, epoch=int(epoch))
        image = images_NHWC[int(order[0])]
        top, left = rng.integers(0, side - config.crop + 1, size=2)
        if rng.random() < config.whole_share:
            shrunk = Image.fromarray(image).resize(
                (config.crop, config.crop), Image.Resampling.BILINEAR
            )
            crops.append(np.asarray(shrunk))
        else:
            crop = image[top : top + config.crop, left : left + config.crop]
            crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return to_pixels(np.stack(crops))


def to_pixels(images_NHWC: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images_NHWC.transpose(0, 3, 1, 2).astype(np.float32)) / 127.5 - 1.0


def train_vae(
    config: PretrainConfig, train: np.ndarray, validation: np.ndarray, out: Path, *, resume: bool
) -> AutoencoderKL:
    """Train and return the averaged VAE; ``train`` and ``validation`` (N, H, W, 3) uint8."""
    device = find_device()
    dtype = torch.bfloat16 if config.vae.precision == "bfloat16" else torch.float32

    weights = Comparison(
        square=config.vae.square_weight,
        pooled=config.vae.pooled_weight,
        gradient=config.vae.gradient_weight,
    )

    def compute_losses(vae: Any, step: int) -> Losses:
        pixels = read_crops(train, config.vae, step).to(device)
        noise = torch.Generator().manual_seed(config.vae.seed * 1_000_003 + step)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            posterior = vae.encode(pixels).latent_dist
            drawn = torch.randn(posterior.mean.shape, generator=noise).to(device)
            ours = vae.decode(posterior.mean + posterior.std * drawn).sample.float()
        rebuilt = compare_images(ours, pixels, weights)
        divergence = measure_divergence(posterior)
        psnr = measure_psnr(ours.detach(), pixels).mean()
        loss = rebuilt + config.vae.kl_weight * divergence
        return {"loss": loss, "rebuilt": rebuilt.detach(), "kl": divergence.detach(), "psnr": psnr}

    def validate(vae: Any) -> dict[str, float]:
        return {"psnr": float(score_vae(vae, validation[:_SCORED], device).mean())}

    vae = build_vae(config.vae.seed)
    fit_colours(vae, to_pixels(np.array(train[:_FITTED])))
    loop = PretrainLoop(
        folder=out / STAGE,
        model=vae,
        config=config.vae,
        num_steps=config.vae.num_steps,
        compute_losses=compute_losses,
        validate=validate,
        device=device,
    )
    trained = loop.run(resume=resume)
    assert isinstance(trained, AutoencoderKL)
    return trained


@torch.no_grad()
def score_vae(vae: Any, images_NHWC: np.ndarray, device: torch.device) -> Tensor:
    """PSNR in dB of each whole image rebuilt from its posterior's mean; float32 (N,)."""
    scores = []
    for start in range(0, len(images_NHWC), _SCORED_AT_ONCE):
        pixels = to_pixels(images_NHWC[start : start + _SCORED_AT_ONCE]).to(device)
        ours = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        scores.append(measure_psnr(ours, pixels).cpu())
    return torch.cat(scores)
