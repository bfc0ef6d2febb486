"""Exports the trained model to a folder in diffusers' layout, float16 safetensors."""

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from models.ldm.family import read_config
from models.ldm.files import load_weights
from models.ldm.text_encoder import TextEncoder
from models.tiny.architecture import TINY_FEW_HEADS
from models.tiny.write import write_components
from pipeline.base.yaml import SpecError
from pipeline.pretrain.ldm import STAGE
from pipeline.pretrain.state import find_last_state, load_average

MAX_BYTES = 16_000_000


def load_start(start: Path) -> nn.ModuleDict:
    """Load UNet and text encoder from the folder that training starts from, to train them."""
    unet = load_weights(UNet2DConditionModel, start, "unet")
    text = TextEncoder.from_pretrained(
        start, variant=None, dtype=torch.float32, zero_empty_prompt=False
    )
    return nn.ModuleDict({"unet": unet, "text": text})


def export_model(start: Path, out: Path, folder: Path) -> int:
    """Write the last checkpoint's averaged weights and the VAE into a folder; return its bytes.

    Raises:
        SpecError: nothing is trained under ``out``, or the model is over ``MAX_BYTES``.
    """
    state = find_last_state(out / STAGE)
    if state is None:
        raise SpecError(f"{out / STAGE}: expected a checkpoint to export; run --stage ldm first")
    model = load_start(start)
    load_average(state, model)
    text: Any = model["text"]  # a TextEncoder
    shutil.copytree(start / "tokenizer", folder / "tokenizer")
    write_components(
        folder,
        unet=model["unet"],
        vae=load_weights(AutoencoderKL, start, "vae"),
        text_encoder=text.encoders[0],
        text_config=read_config(start, "text_encoder"),
        scaling_factor=float(read_config(start, "vae")["scaling_factor"]),
        architecture=TINY_FEW_HEADS,
        dtype=torch.float16,
    )
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if num_bytes > MAX_BYTES:
        raise SpecError(
            f"{out}: the model must be at most {MAX_BYTES} bytes to be part of the project, got "
            f"{num_bytes}; narrow TINY_FEW_HEADS"
        )
    return num_bytes
