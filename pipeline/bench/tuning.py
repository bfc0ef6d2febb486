"""How far run options and lower precision change features, and the time that they save.

The same UNet runs on the same inputs in every variant; float32 without options is the reference.
Inputs are random latents and texts, so that any model's UNet can be measured.

Shape suffixes: B batch, C channels, H/W latent height and width, T text tokens, D text width.
"""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from models.ldm.encoders import COMPUTE_DTYPES, FeatureEncoder
from models.ldm.sd14 import NUM_TOKENS
from models.ldm.tuning import PLAIN, Tuning
from models.ldm.unet_config import LATENT_DOWNSCALE, read_pooled_width, read_text_width
from pipeline.base.machine import check_measured, wait_for_device
from pipeline.bench.inputs import load_unet
from pipeline.spec.fields import TOLERANCES

VARIANTS = (
    ("float32", PLAIN),
    ("float32", Tuning(channels_last=True)),
    ("float32", Tuning(compile=True)),
    ("float32", Tuning(channels_last=True, compile=True)),
    ("bfloat16", PLAIN),
    ("float16", PLAIN),
)


@dataclass(frozen=True, slots=True)
class TuningRow:
    """One variant: its largest deviation from plain float32, and its time.

    ``deviation`` is the largest max|x - x'| / max|x'| of any row and block; ``tolerance`` is what
    a layer of this ``compute`` states, float16 storage included. ``last_batch_s`` is the time of a
    smaller batch after the first, where a compiled model must not compile anew.
    """

    compute: str
    channels_last: bool
    compile: bool
    deviation: float
    tolerance: float
    first_batch_s: float
    batch_s: float
    last_batch_s: float


def measure_tuning(
    model: str | None,
    *,
    blocks: tuple[int, ...],
    size_px: int,
    batch: int,
    device: torch.device,
    repeats: int = 3,
) -> list[TuningRow]:
    """Measure every variant of a UNet on the device, one after another.

    Raises:
        ValueError: a block is not one of the UNet's, or the size or device is not one to measure.
    """
    check_measured("bench tuning", size_px=size_px, device=device)
    unet = load_unet(model)
    inputs = _draw_inputs(unet, size_px=size_px, batch=batch)
    rows: list[TuningRow] = []
    reference: dict[int, Tensor] = {}
    for compute, tuning in VARIANTS:
        encoder = FeatureEncoder(
            # diffusers' own ``to`` warns of layers kept in float32: there are none
            unet=nn.Module.to(copy.deepcopy(unet), COMPUTE_DTYPES[compute]),
            alphas_cumprod=DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod,
            blocks=blocks,
            device=device,
            tuning=tuning,
        )
        first, found = _time(encoder, inputs)
        times = [_time(encoder, inputs)[0] for _ in range(repeats)]
        last, _ = _time(encoder, {name: x[: max(1, batch // 2)] for name, x in inputs.items()})
        features = {number: feature.float().cpu() for number, feature in found.items()}
        reference = reference or features
        variant = (compute, tuning.channels_last, tuning.compile)
        error = _largest_deviation(features, reference)
        rows.append(TuningRow(*variant, error, TOLERANCES[compute], first, min(times), last))
    return rows


def _draw_inputs(unet: UNet2DConditionModel, *, size_px: int, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = size_px // LATENT_DOWNSCALE
    latent = (batch, unet.config.in_channels, side, side)
    inputs = {
        "latent_BCHW": torch.randn(latent, generator=generator),
        "noise_BCHW": torch.randn(latent, generator=generator),
        "timestep_B": torch.randint(300, 500, (batch,), generator=generator),
        "text_BTD": torch.randn(
            batch, NUM_TOKENS, read_text_width(unet.config), generator=generator
        ),
    }
    pooled = read_pooled_width(unet.config)
    if pooled is not None:
        inputs["pooled_BP"] = torch.randn(batch, pooled, generator=generator)
    return inputs


def _time(encoder: FeatureEncoder, inputs: Mapping[str, Tensor]) -> tuple[float, dict[int, Tensor]]:
    start = time.perf_counter()
    features = encoder.encode_features(**inputs)
    wait_for_device(encoder.device)
    return time.perf_counter() - start, features


def _largest_deviation(features: Mapping[int, Tensor], reference: Mapping[int, Tensor]) -> float:
    """Return the largest deviation of any row: over that row's largest value, as a layer states."""
    largest = 0.0
    for number, expected_BChw in reference.items():
        error_B = (features[number] - expected_BChw).abs().flatten(1).amax(dim=1)
        scale_B = expected_BChw.abs().flatten(1).amax(dim=1)
        largest = max(largest, float((error_B / scale_B).max()))
    return largest
