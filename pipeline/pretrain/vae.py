"""Training the tiny VAE to reconstruct crops of scenes.

Data flow: tars -> one memory-mapped uint8 file of all images -> scenes in the epoch's order -> a
random crop, or the whole scene shrunk -> reconstruction.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.tiny.losses import compare_images, measure_divergence, measure_psnr
from models.tiny.untrained import build_vae, fit_colours
from pipeline.base.machine import choose_device
from pipeline.base.whole_file import open_whole
from pipeline.pretrain.config import VaeConfig
from pipeline.pretrain.loop import PretrainLoop, list_items, open_autocast

STAGE = "vae"
_SCORED = 96  # validation scenes at each validation
_SCORED_AT_ONCE = 16
_FITTED = 16  # training scenes that the VAE's start is fitted to


def open_images(out: Path, split: str) -> np.ndarray:
    """Map the images of a split (N, H, W, 3) uint8; the first call decodes the tars to a file."""
    path = out / f"images-{split}.npy"
    if not path.exists():
        images = []
        for tar_path in sorted((out / "corpus").glob(f"pretrain-{split}-*.tar")):
            with tarfile.open(tar_path) as tar:
                for name in tar.getnames():
                    if name.endswith(".jpg"):
                        jpeg = tar.extractfile(name)
                        assert jpeg is not None
                        images.append(np.asarray(Image.open(jpeg).convert("RGB")))
        with open_whole(path) as file:
            np.save(file, np.stack(images))
    mapped: np.ndarray = np.load(path, mmap_mode="r")
    return mapped


def read_crops(images_NHWC: np.ndarray, config: VaeConfig, step: int) -> Tensor:
    """Return the crops of a step, (B, 3, crop, crop) float32 in [-1, 1]."""
    num, side = images_NHWC.shape[:2]
    rng = np.random.Generator(np.random.PCG64([config.seed, step]))
    crops = []
    for number in list_items(step, config.batch_size, num=num, seed=config.seed):
        image = images_NHWC[number]
        top, left = rng.integers(0, side - config.crop + 1, size=2)
        if rng.random() < config.whole_share:
            size = (config.crop, config.crop)
            crops.append(np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)))
        else:
            crop = image[top : top + config.crop, left : left + config.crop]
            crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return to_pixels(np.stack(crops))


def to_pixels(images_NHWC: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images_NHWC.transpose(0, 3, 1, 2).astype(np.float32)) / 127.5 - 1.0


@dataclass(frozen=True)
class VaeObjective:
    """Reconstruction loss on crops; PSNR on whole validation scenes. Images (N, H, W, 3) uint8."""

    config: VaeConfig
    train: np.ndarray
    validation: np.ndarray
    device: torch.device

    def compute_losses(self, vae: Any, step: int) -> dict[str, Tensor]:
        """Return a step's loss, its two parts, and the crops' mean PSNR."""
        config = self.config
        pixels = read_crops(self.train, config, step).to(self.device)
        noise = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        with open_autocast(config, self.device):
            posterior = vae.encode(pixels).latent_dist
            drawn = torch.randn(posterior.mean.shape, generator=noise).to(self.device)
            ours = vae.decode(posterior.mean + posterior.std * drawn).sample.float()
        rebuilt = compare_images(
            ours,
            pixels,
            square=config.square_weight,
            pooled=config.pooled_weight,
            gradient=config.gradient_weight,
        )
        divergence = measure_divergence(posterior)
        psnr = measure_psnr(ours.detach(), pixels).mean()
        loss = rebuilt + config.kl_weight * divergence
        return {"loss": loss, "rebuilt": rebuilt, "kl": divergence, "psnr": psnr}

    def validate(self, vae: Any) -> dict[str, float]:
        """Return the mean PSNR in dB."""
        return {"psnr": float(score_vae(vae, self.validation[:_SCORED], self.device).mean())}


def train_vae(
    config: VaeConfig, train: np.ndarray, validation: np.ndarray, out: Path, *, resume: bool
) -> None:
    """Train the VAE on images (N, H, W, 3) uint8; checkpoints are below ``out / STAGE``."""
    device = choose_device(None)
    vae = build_vae(config.seed)
    fit_colours(vae, to_pixels(np.array(train[:_FITTED])))
    objective = VaeObjective(config, train, validation, device)
    PretrainLoop(out / STAGE, vae, config, objective, device).run(resume=resume)


@torch.no_grad()
def score_vae(vae: Any, images_NHWC: np.ndarray, device: torch.device) -> Tensor:
    """PSNR in dB of each whole image rebuilt from its posterior's mean; float32 (N,)."""
    scores = []
    for start in range(0, len(images_NHWC), _SCORED_AT_ONCE):
        pixels = to_pixels(images_NHWC[start : start + _SCORED_AT_ONCE]).to(device)
        ours = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        scores.append(measure_psnr(ours, pixels).cpu())
    return torch.cat(scores)
