"""What a benchmark runs on where the user gives nothing: random models and drawn scenes."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from models.ldm.sd14 import SD14_UNET
from models.tiny.architecture import SD14_SIZE, TINY
from models.tiny.write import write_tiny_ldm
from pipeline.scenes.scene import draw_scene, list_words, write_corpus
from pipeline.spec.blocks import SD14
from pipeline.spec.fetch_model import fetch_model

MODEL_SEED = 2
CALIBRATION_IMAGES = 16


def prepare_model(model: str | None, folder: Path, *, size_px: int = 128) -> Path:
    """Return a model's folder, in diffusers' layout.

    Args:
        model: a diffusers folder, hub id or URL; None for a tiny LDM, ``sd14`` for one of SD 1.4's
            size (4.3 GB): the real classes with random weights, written to ``folder``.
        folder: where a random model is written.
        size_px: of the scenes that the tiny model's scaling factor is taken from.
    """
    if model is not None and model != SD14:
        return fetch_model(model)
    calibration = None
    if model is None:
        scenes = [
            draw_scene(seed=0, split="train", index=index, size_px=size_px).image
            for index in range(CALIBRATION_IMAGES)
        ]
        calibration = torch.from_numpy(np.stack(scenes))
    write_tiny_ldm(
        folder,
        words=list_words(),
        seed=MODEL_SEED,
        calibration_BHWC=calibration,
        architecture=SD14_SIZE if model == SD14 else TINY,
    )
    return folder


def load_unet(model: str | None) -> UNet2DConditionModel:
    """Load the UNet of such a model, in float32 on the CPU."""
    if model == SD14:  # without writing its weights first
        torch.manual_seed(0)
        return UNet2DConditionModel.from_config(dict(SD14_UNET))
    with tempfile.TemporaryDirectory(prefix="ldznet-bench-") as name:
        folder = prepare_model(model, Path(name))
        return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)


def write_scenes(folder: Path, *, num: int, num_tars: int, size_px: int) -> list[str]:
    """Write the demo's first ``num`` validation scenes as tars; return the corpus pattern."""
    write_corpus(
        folder, split="val", num_images=num, images_per_tar=-(-num // num_tars), size_px=size_px
    )
    return [str(folder / "*.tar")]
