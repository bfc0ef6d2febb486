"""Samples of images from prompts, by diffusers' own Stable Diffusion pipeline."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline


def sample_images(
    folder: Path,
    prompts: Sequence[str],
    *,
    num_samples: int,
    size_px: int,
    num_steps: int = 30,
    guidance: float = 5.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Sample with DDIM (Song et al. 2021) and classifier-free guidance (Ho and Salimans 2022).

    ``folder`` is in diffusers' layout; ``num_steps`` of the 1000 timesteps are taken; ``guidance``
    1 is none. Returns (prompts, num_samples, size_px, size_px, 3) uint8; the same arguments give
    the same images on one machine.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder,
        torch_dtype=torch.float32,  # transformers 5 would leave the text encoder in the file's
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for number, prompt in enumerate(prompts):
        images = pipeline(
            prompt,
            num_images_per_prompt=num_samples,
            height=size_px,
            width=size_px,
            num_inference_steps=num_steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed * 1000 + number),
            output_type="np",
        ).images
        rows.append(np.rint(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8))
    return np.stack(rows)
