"""Where the time of encoding a batch and of a training step goes.

The same code runs twice. On the device a ``Meter`` reads the clock, at the borders of parts, after
waiting for the device; on the meta device, which computes no values, it reads torch's FLOP counter.
So each part has seconds and FLOPs. Weights are random: only a model's configs are read, and no
value changes what an operation costs.

Shape suffixes: B batch, C channels, H/W latent height and width, T text tokens, D text width.
"""

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from models.heads.head import Head
from models.heads.ldznet import PAPER_BLOCKS
from models.heads.registry import HEADS
from models.ldm.blocks import feature_shape, list_blocks, read_features, select_blocks
from models.ldm.conditions import find_text_width
from models.ldm.encoders import COMPUTE_DTYPES
from models.ldm.files import ModelFilesError
from models.ldm.quantize import quantize_int8
from models.ldm.sd14 import SD14_TEXT, SD14_UNET, SD14_VAE
from pipeline.base.machine import check_measured, wait_for_device
from pipeline.bench.meter import Meter, find_parts
from pipeline.spec.blocks import SD14
from pipeline.spec.fetch_model import fetch_model
from pipeline.spec.fields import LATENT_DOWNSCALE

STORAGES = ("float16", "int8")
WARM_UPS = 1


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """One part of one stage: mean seconds a batch, its share of the stage, its FLOPs.

    ``gflop`` counts convolutions and matrix products alone; both figures are None for a part that
    has none.
    """

    stage: str
    part: str
    seconds: float
    share: float
    gflop: float | None
    gflop_per_s: float | None


@dataclass(frozen=True, slots=True)
class StageTime:
    """A whole stage without the meter's waits: fastest and slowest repeat, seconds a batch."""

    stage: str
    fastest_s: float
    slowest_s: float


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """What is profiled.

    ``compute`` is the dtype of encoding; a training step runs in float32, and with another
    ``compute`` under bfloat16 autocast, as the trainer does on a GPU. ``head`` None leaves the
    training step out.
    """

    size_px: int
    batch: int
    device: torch.device
    head: str | None = "ldznet"
    compute: str = "float32"
    storage: str = "float16"
    repeats: int = 3


@dataclass(frozen=True, slots=True)
class LdmConfigs:
    """The three configs that an LDM's networks are built from."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ldm:
    """An LDM's networks, frozen."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel


def read_ldm_configs(model: str) -> LdmConfigs:
    """Read the configs of a diffusers folder or hub id; ``sd14`` is SD 1.4's, built in.

    Raises:
        ModelFilesError: a config is missing, or the UNet reads more than one text (SDXL).
    """
    if model == SD14:
        return LdmConfigs(SD14_UNET, SD14_VAE, SD14_TEXT)
    folder = fetch_model(model)
    try:
        unet = UNet2DConditionModel.load_config(folder, subfolder="unet")
        vae = AutoencoderKL.load_config(folder, subfolder="vae")
        text = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder").to_dict()
    except OSError as error:
        raise ModelFilesError(f"{folder}: a config cannot be read: {error}") from error
    if unet.get("addition_embed_type") is not None:
        raise ModelFilesError(
            f"{folder}: bench profile runs UNets that read one text (SD 1 and 2), got "
            f"addition_embed_type {unet['addition_embed_type']!r}"
        )
    return LdmConfigs(unet, vae, text)


def build_ldm(configs: LdmConfigs, *, device: torch.device, dtype: torch.dtype) -> Ldm:
    """Build the networks with random weights, or with none on the meta device."""
    with torch.device(device):
        networks = (
            UNet2DConditionModel.from_config(dict(configs.unet)),
            AutoencoderKL.from_config(dict(configs.vae)),
            CLIPTextModel(CLIPTextConfig(**configs.text)),
        )
    for network in networks:
        nn.Module.to(
            network, dtype
        )  # diffusers' own warns of layers kept in float32: there are none
        network.eval().requires_grad_(False)
    return Ldm(*networks)


def profile_model(
    configs: LdmConfigs, options: ProfileOptions
) -> tuple[list[ProfileRow], list[StageTime]]:
    """Profile one encode batch and one training step.

    Raises:
        ValueError: an option is not one of those there are, or the model does not take it.
    """
    _check(options)
    rows, times = [], []
    for stage, prepare in _list_stages(configs, options).items():
        run = prepare(options.device)
        seconds, fastest, slowest = _measure(run, options)
        flops = count_parts(prepare(torch.device("meta")))
        rows += _make_rows(stage, seconds, flops)
        times.append(StageTime(stage, fastest, slowest))
        del run  # its networks, before those of the next stage are built
    return rows, times


def _check(options: ProfileOptions) -> None:
    allowed = {
        "head": (options.head, (*HEADS, None)),
        "compute": (options.compute, tuple(COMPUTE_DTYPES)),
        "storage": (options.storage, STORAGES),
    }
    for name, (value, values) in allowed.items():
        if value not in values:
            raise ValueError(f"bench profile: {name} must be one of {values}, got {value!r}")
    check_measured("bench profile", size_px=options.size_px, device=options.device)


Run = Callable[[Meter], None]
Prepare = Callable[[torch.device], Run]


def _list_stages(configs: LdmConfigs, options: ProfileOptions) -> dict[str, Prepare]:
    stages: dict[str, Prepare] = {
        "encode": lambda device: build_encode_batch(configs, options, device)
    }
    if options.head is not None:
        name = options.head
        stages[f"train {name}"] = lambda device: prepare_training(configs, options, device)
    return stages


def build_encode_batch(configs: LdmConfigs, options: ProfileOptions, device: torch.device) -> Run:
    """Return a function that encodes one batch: a view, a prompt and one draw a row."""
    dtype = COMPUTE_DTYPES[options.compute]
    ldm = build_ldm(configs, device=device, dtype=dtype)
    blocks = select_blocks(ldm.unet, PAPER_BLOCKS)
    modules = find_parts(ldm.unet, prefix="UNet: ")
    side, batch = options.size_px, options.batch
    image = torch.zeros(batch, 3, side, side, device=device, dtype=dtype).uniform_(-1, 1)
    tokens = torch.ones(batch, configs.text["max_position_embeddings"], device=device).long()
    timestep = torch.full((batch,), 400, device=device)

    def encode(meter: Meter) -> None:
        with torch.inference_mode():
            with meter.part("VAE encoder"):
                latent = ldm.vae.encode(image).latent_dist.mean
            with meter.part("text encoder"):
                text = ldm.text_encoder(tokens).last_hidden_state
            with meter.part("UNet: other"), meter.watch(modules):
                features = read_features(ldm.unet, latent, timestep, text, blocks=blocks)
            with meter.part(f"to {options.storage}"):
                stored = [_to_form(feature, options.storage) for feature in features.values()]
            if device.type != "meta":
                with meter.part("to the host"):
                    for tensors in stored:
                        for tensor in tensors:
                            tensor.cpu()

    return encode


def _to_form(feature: Tensor, storage: str) -> tuple[Tensor, ...]:
    if storage == "int8":
        return quantize_int8(feature.float())
    return (feature.float().half(),)


def prepare_training(configs: LdmConfigs, options: ProfileOptions, device: torch.device) -> Run:
    """Return a function that takes one step of a head, as the trainer takes it."""
    assert options.head is not None
    extra = {"size_px": options.size_px} if options.head == "ldznet" else {}
    with torch.device(device):
        head = HEADS[options.head].from_ldm_config(dict(configs.unet), **extra).to(device).train()
    inputs = _make_inputs(configs, options, head, device)
    mask = torch.ones(options.batch, 1, options.size_px, options.size_px, device=device)
    modules = find_parts(head, prefix="forward: ")
    on_meta = device.type == "meta"
    average = None if on_meta else copy.deepcopy(head).eval().requires_grad_(False)
    optimizer = None if on_meta else torch.optim.AdamW(head.parameters(), lr=1e-6)
    mixed = options.compute != "float32" and not on_meta

    def step(meter: Meter) -> None:
        head.zero_grad(set_to_none=True)
        with meter.part("forward: other"), meter.watch(modules):
            with torch.autocast(device.type, dtype=torch.bfloat16) if mixed else nullcontext():
                logits = head(**inputs)
        with meter.part("loss"):
            loss = F.binary_cross_entropy_with_logits(logits.float(), mask)
        with meter.part("backward"):
            loss.backward()
        if optimizer is not None and average is not None:
            with meter.part("gradient norm"):
                nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            with meter.part("optimizer"):
                optimizer.step()
            with meter.part("averaged weights"):
                _update(average, head)

    return step


@torch.no_grad()
def _update(average: nn.Module, head: nn.Module) -> None:
    theirs = head.state_dict()
    for name, value in average.state_dict().items():
        value.lerp_(theirs[name], 0.001)


def _make_inputs(
    configs: LdmConfigs, options: ProfileOptions, head: Head, device: torch.device
) -> dict[str, Any]:
    """Random inputs of a head, all that any head reads; it takes those it names."""
    side, batch = options.size_px // LATENT_DOWNSCALE, options.batch
    tokens, width = configs.text["max_position_embeddings"], find_text_width(configs.unet)
    size = options.size_px
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(configs.unet))
    with torch.device(device):
        everything: dict[str, Any] = {
            "latent": torch.randn(batch, configs.unet["in_channels"], side, side),
            "image": torch.zeros(batch, size, size, 3, dtype=torch.uint8),
            "text": torch.randn(batch, tokens, width),
            "features": {
                block.number: torch.randn(batch, *feature_shape(block, (side, side)))
                for block in list_blocks(unet)
                if block.number in PAPER_BLOCKS
            },
        }
    return {name: everything[name] for name in head.inputs}


def _measure(run: Run, options: ProfileOptions) -> tuple[dict[str, float], float, float]:
    """Mean seconds by part, and the fastest and slowest of as many repeats without parts."""

    def clock() -> float:
        wait_for_device(options.device)
        return time.perf_counter()

    for _ in range(WARM_UPS):
        run(Meter(lambda: 0.0))
    meter, whole = Meter(clock), []
    for _ in range(options.repeats):
        run(meter)
        start = clock()
        run(Meter(lambda: 0.0))
        whole.append(clock() - start)
    means = {part: seconds / options.repeats for part, seconds in meter.totals.items()}
    return means, min(whole), max(whole)


def count_parts(run: Run) -> dict[str, float]:
    """Return part → FLOPs of a run; on the meta device, where attention counts."""
    counter = FlopCounterMode(display=False)
    meter = Meter(counter.get_total_flops)
    with counter:
        run(meter)
    return meter.totals


def _make_rows(
    stage: str, seconds: Mapping[str, float], flops: Mapping[str, float]
) -> list[ProfileRow]:
    total = sum(seconds.values())
    rows = []
    for part, spent in seconds.items():
        gflop = flops.get(part, 0.0) / 1e9 or None
        rate = gflop / spent if gflop and spent > 0 else None
        rows.append(ProfileRow(stage, part, spent, spent / total, gflop, rate))
    return rows
