"""Writes a latent diffusion model of Stable Diffusion 1's kind, tiny or not, with random weights.

Nothing is trained, but the weights are drawn so that a signal gets through: see ``_draw_weight``.
Layout, configs and the names in the weight files are those of the published Stable Diffusion 1.4.
They are written here and not by ``save_pretrained``, so that the bytes depend on the arguments and
not on library versions.

Shapes: B images, H, W pixels, C latent channels, h, w latent positions.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from models.ldm.files import write_config
from models.ldm.sd14 import NUM_TOKENS, SD14_INDEX, SD14_SCHEDULE, SD14_VAE, TEXT_PREFIX
from models.tiny.architecture import TINY, Architecture
from models.tiny.tokenizer import write_tokenizer

_SCHEDULER_CONFIG = SD14_SCHEDULE | {"_class_name": "DDPMScheduler"}
_INDEX = SD14_INDEX | {"scheduler": ["diffusers", "DDPMScheduler"]}
_QUERIES_AND_KEYS = ("to_q.", "to_k.", "q_proj.", "k_proj.")
_BRANCH_ENDS = ("conv2.", "proj_out.", "to_out.", "out_proj.", "fc2.")
_AVERAGING = "downsamplers.0.conv.weight"
_POINTWISE = ("conv_in.weight", "conv_out.weight")


def write_tiny_ldm(
    folder: Path,
    *,
    words: Sequence[str],
    seed: int = 0,
    calibration_BHWC: Tensor | None = None,
    architecture: Architecture = TINY,
) -> None:
    """Write a model with random weights; the same arguments give the same bytes.

    Args:
        folder: where ``model_index.json``, ``vae/``, ``unet/``, ``text_encoder/``, ``tokenizer/``
            and ``scheduler/`` go; created if need be, files there are replaced.
        words: each becomes one token, in lower case; letters only.
        seed: of all weights, at least 0.
        calibration_BHWC: uint8 RGB images (B, H, W, 3), sides multiples of 8. The VAE's
            ``scaling_factor`` is then 1 / std of the posterior mean over them, to 5 digits, as SD
            chose its own (Rombach et al. 2022, section 4); without them it is SD 1's 0.18215.
        architecture: tiny, or another of SD 1's kind.

    Raises:
        ValueError: the seed is negative, a word is not made of letters, or the calibration images
            are not as described.
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0, but got {seed}")
    text_config = write_words(folder, words, architecture)
    text_encoder = CLIPTextModel(CLIPTextConfig(**text_config))
    unet = UNet2DConditionModel.from_config(dict(architecture.unet))
    vae = AutoencoderKL.from_config(dict(architecture.vae))
    for name, model in (("text_encoder", text_encoder), ("unet", unet), ("vae", vae)):
        draw_weights(model, seed=seed, name=name)
    scaling_factor = SD14_VAE["scaling_factor"]
    if calibration_BHWC is not None:
        scaling_factor = measure_scaling_factor(vae, calibration_BHWC)
    write_components(
        folder,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        text_config=text_config,
        scaling_factor=scaling_factor,
        architecture=architecture,
    )


def write_words(
    folder: Path, words: Sequence[str], architecture: Architecture = TINY
) -> dict[str, Any]:
    """Write ``tokenizer/``, a token a word, and return the text encoder's config for it."""
    vocab_size = write_tokenizer(folder / "tokenizer", words=words, max_tokens=NUM_TOKENS)
    token_ids = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}
    return {**architecture.text, **token_ids, "pad_token_id": 1, "vocab_size": vocab_size}


def write_components(
    folder: Path,
    *,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    text_config: Mapping[str, Any],
    scaling_factor: float,
    architecture: Architecture = TINY,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write all but the tokenizer of a folder in diffusers' layout, with weights of ``dtype``.

    ``scaling_factor`` is the VAE's; ``text_config`` is what ``write_words`` returned.
    """
    write_config(folder / "model_index.json", _INDEX)
    write_config(folder / "scheduler" / "scheduler_config.json", _SCHEDULER_CONFIG)
    vae_config = {**architecture.vae, "scaling_factor": scaling_factor}
    write_config(folder / "vae" / "config.json", vae_config)
    write_config(folder / "unet" / "config.json", architecture.unet)
    write_config(folder / "text_encoder" / "config.json", text_config)
    _write_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", vae, dtype)
    _write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", unet, dtype)
    path = folder / "text_encoder" / "model.safetensors"
    _write_weights(path, text_encoder, dtype, TEXT_PREFIX)


def measure_scaling_factor(vae: AutoencoderKL, images_BHWC: Tensor) -> float:
    """Return 1 / std of the posterior mean over images (B, H, W, 3) uint8, to 5 digits.

    Computed in float64, so that the order in which a machine sums does not reach the digits kept.
    The VAE is float32 again afterwards, its weights unchanged.

    Raises:
        ValueError: the images are not uint8 of that shape with sides multiples of 8, or the
            posterior mean is the same everywhere.
    """
    shape = tuple(images_BHWC.shape)
    sides_fit = len(shape) == 4 and shape[3] == 3 and shape[1] % 8 == 0 and shape[2] % 8 == 0
    if images_BHWC.dtype != torch.uint8 or not sides_fit or 0 in shape:
        raise ValueError(
            "calibration images must be uint8 of shape (B, H, W, 3) with sides multiples of 8, "
            f"but got {images_BHWC.dtype} of shape {shape}"
        )
    vae.double().eval()
    with torch.no_grad():
        mean_BChw = torch.cat(
            [
                vae.encode(image_HWC.permute(2, 0, 1)[None].double() / 127.5 - 1.0).latent_dist.mean
                for image_HWC in images_BHWC
            ]
        )
    vae.float()
    std = float(mean_BChw.std(correction=0))
    if not std > 0.0:
        raise ValueError(f"the posterior mean must vary over the images, but its std is {std}")
    return round(1.0 / std, 5)


def draw_weights(model: nn.Module, *, seed: int, name: str) -> None:
    """Draw every weight anew in place; each depends on (seed, its published name) alone.

    ``name`` is the component's: ``vae``, ``unet`` or ``text_encoder``.
    """
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                published = f"{name}.{key.removeprefix(TEXT_PREFIX)}"
                key_seed = [seed, zlib.crc32(published.encode())]
                rng = np.random.Generator(np.random.PCG64(key_seed))
                tensor.copy_(torch.from_numpy(_draw_weight(published, tuple(tensor.shape), rng)))


def _draw_weight(key: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw one tensor, float32: normal, but 1 for norms' scales and 0 for biases.

    The std is LeCun's 1 / sqrt(fan in), which keeps the variance, with these exceptions:

    - Queries and keys get twice that, or else a random attention is nearly uniform and says nothing
      of the prompt.
    - The last layer of a residual branch gets half, in the VAE's encoder a tenth, so that the
      branch does not drown its input.
    - The encoder's first and last convolutions only mix channels, and its downsamplers average
      besides. So latents keep the colour of a place, as a trained encoder's do.
    - The posterior's log-variance lies about -10, well below the mean's spread, as a trained one's.
    """
    if key.endswith("embedding.weight"):
        scale = np.float32(0.3 if "position" in key else 1.0)
        return scale * rng.standard_normal(shape, dtype=np.float32)
    if len(shape) < 2:
        tensor = np.full(shape, 1.0 if key.endswith("weight") else 0.0, dtype=np.float32)
        if key == "vae.quant_conv.bias":
            tensor[len(tensor) // 2 :] = -10.0
        return tensor
    in_encoder = key.startswith("vae.encoder.")
    if in_encoder and key.endswith((_AVERAGING, *_POINTWISE)):
        mixing = rng.standard_normal((*shape[:2], 1, 1), dtype=np.float32)
        window = np.zeros(shape[2:], dtype=np.float32)
        window[shape[2] // 2, shape[3] // 2] = 1.0
        if key.endswith(_AVERAGING):
            window[:] = 1.0 / window.size
        return mixing * window / np.float32(math.sqrt(shape[1]))
    gain = 1.0
    if any(part in key for part in _QUERIES_AND_KEYS):
        gain = 2.0
    elif any(part in key for part in _BRANCH_ENDS):
        gain = 0.1 if in_encoder else 0.5
    return np.float32(gain / math.sqrt(math.prod(shape[1:]))) * rng.standard_normal(
        shape, dtype=np.float32
    )


def _write_weights(path: Path, model: nn.Module, dtype: torch.dtype, prefix: str = "") -> None:
    """Write all floating point tensors as safetensors, with names that start with ``prefix``."""
    weights = {
        prefix + key.removeprefix(prefix): tensor.detach().to("cpu", dtype).contiguous()
        for key, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(weights, metadata={"format": "pt"}))
