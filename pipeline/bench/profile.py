"""Where the time of an encode batch and of a training step goes, part by part.

The same code runs twice. On the device a ``Meter`` reads the clock, after waiting for the device at
the end of each part. On the meta device, which computes no values, it reads torch's FLOP counter.
So each part has seconds and FLOPs. Only a model's configs are read; the weights are random, for
values do not change what an operation costs.

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
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from models.heads.head import Head
from models.heads.inputs import describe_inputs
from models.heads.options import PAPER_BLOCKS
from models.heads.registry import HEADS
from models.ldm.blocks import compute_features, select_blocks
from models.ldm.encoders import COMPUTE_DTYPES
from models.ldm.family import read_config
from models.ldm.files import ModelFilesError
from models.ldm.sd14 import SD14_TEXT, SD14_UNET, SD14_VAE
from pipeline.base.machine import check_measured, wait_for_device
from pipeline.bench.meter import Meter, find_parts
from pipeline.bench.parameters import build_fresh_head
from pipeline.spec.blocks import SD14
from pipeline.spec.fetch_model import fetch_model

Configs = Mapping[str, Mapping[str, Any]]
"""The JSON configs of an LDM's unet, vae and text_encoder."""
Run = Callable[[Meter], None]
"""One batch or step; the meter is told which part runs."""


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """One part of one stage: mean seconds a batch, its share of the stage, its FLOPs.

    ``gflop`` counts convolutions and matrix products alone; it and ``gflop_per_s`` are None for a
    part without any.
    """

    stage: str
    part: str
    seconds: float
    share: float
    gflop: float | None
    gflop_per_s: float | None


@dataclass(frozen=True, slots=True)
class StageTime:
    """A whole stage without waiting at parts: seconds of the fastest and the slowest batch."""

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
    repeats: int = 3


@dataclass(frozen=True, slots=True)
class Ldm:
    """An LDM's networks, frozen."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel


def read_ldm_configs(model: str) -> Configs:
    """Read the configs of a diffusers folder or hub id; ``sd14`` is SD 1.4's, built in.

    Raises:
        ModelFilesError: a config is missing, or the UNet reads more than one text (SDXL).
    """
    if model == SD14:
        return {"unet": SD14_UNET, "vae": SD14_VAE, "text_encoder": SD14_TEXT}
    folder = fetch_model(model)
    configs = {part: read_config(folder, part) for part in ("unet", "vae", "text_encoder")}
    added = configs["unet"].get("addition_embed_type")
    if added is not None:
        raise ModelFilesError(
            f"{folder}: bench profile runs UNets that read one text (SD 1 and 2), got "
            f"addition_embed_type {added!r}"
        )
    return configs


def build_ldm(configs: Configs, *, device: torch.device, dtype: torch.dtype) -> Ldm:
    """Build the networks with random weights, or with none on the meta device."""
    with torch.device(device):
        networks = (
            UNet2DConditionModel.from_config(dict(configs["unet"])),
            AutoencoderKL.from_config(dict(configs["vae"])),
            CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        )
    for network in networks:
        # diffusers' own ``to`` warns of layers kept in float32: there are none
        nn.Module.to(network, dtype).eval().requires_grad_(False)
    return Ldm(*networks)


def profile_model(
    configs: Configs, options: ProfileOptions
) -> tuple[list[ProfileRow], list[StageTime]]:
    """Profile one encode batch and one training step; ValueError for an option that is unknown."""
    _check(options)
    builders = {"encode": build_encode_batch}
    if options.head is not None:
        builders[f"train {options.head}"] = build_training_step
    rows, times = [], []
    for stage, build in builders.items():
        run = build(configs, options, options.device)
        seconds, fastest, slowest = _measure(run, options)
        flops = _count_parts(build(configs, options, torch.device("meta")))
        rows += _make_rows(stage, seconds, flops)
        times.append(StageTime(stage, fastest, slowest))
        del run  # its networks, before those of the next stage are built
    return rows, times


def _check(options: ProfileOptions) -> None:
    allowed = {
        "head": (options.head, (*HEADS, None)),
        "compute": (options.compute, tuple(COMPUTE_DTYPES)),
    }
    for name, (value, values) in allowed.items():
        if value not in values:
            raise ValueError(f"bench profile: {name} must be one of {values}, got {value!r}")
    check_measured("bench profile", size_px=options.size_px, device=options.device)


def build_encode_batch(configs: Configs, options: ProfileOptions, device: torch.device) -> Run:
    """Return a function that encodes one batch; each row is a view, a prompt and one draw."""
    dtype = COMPUTE_DTYPES[options.compute]
    ldm = build_ldm(configs, device=device, dtype=dtype)
    blocks = select_blocks(ldm.unet, PAPER_BLOCKS)
    modules = find_parts(ldm.unet, prefix="UNet: ")
    side, batch = options.size_px, options.batch
    image = torch.zeros(batch, 3, side, side, device=device, dtype=dtype).uniform_(-1, 1)
    num_tokens = ldm.text_encoder.config.max_position_embeddings
    tokens = torch.ones(batch, num_tokens, device=device).long()
    timestep = torch.full((batch,), 400, device=device)

    def encode(meter: Meter) -> None:
        with torch.inference_mode():
            with meter.part("VAE encoder"):
                latent = ldm.vae.encode(image).latent_dist.mean
            with meter.part("text encoder"):
                text = ldm.text_encoder(tokens).last_hidden_state
            with meter.part("UNet: other"), meter.watch(modules):
                features = compute_features(ldm.unet, latent, timestep, text, blocks=blocks)
            with meter.part("to float16"):
                stored = [feature.float().half() for feature in features.values()]
            if device.type != "meta":
                with meter.part("to the host"):
                    for feature in stored:
                        feature.cpu()

    return encode


def build_training_step(configs: Configs, options: ProfileOptions, device: torch.device) -> Run:
    """Return a function that makes one training step of a head, as the trainer makes it."""
    assert options.head is not None
    with torch.device(device):
        head = build_fresh_head(options.head, configs["unet"], size_px=options.size_px)
    head.to(device).train()
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
                with torch.no_grad():
                    theirs = head.state_dict()
                    for name, value in average.state_dict().items():
                        value.lerp_(theirs[name], 0.001)

    return step


def _make_inputs(
    configs: Configs, options: ProfileOptions, head: Head, device: torch.device
) -> dict[str, Any]:
    """Random values of all inputs that the head reads."""
    size, batch = options.size_px, options.batch
    tokens = CLIPTextConfig(**configs["text_encoder"]).max_position_embeddings
    held = describe_inputs(configs["unet"], tuple(head.feature_channels), view_px=size)
    side = held.latent_side
    with torch.device(device):
        everything: dict[str, Any] = {
            "latent": torch.randn(batch, held.latent_channels, side, side),
            "image": torch.zeros(batch, size, size, 3, dtype=torch.uint8),
            "text": torch.randn(batch, tokens, held.text_width),
            "features": {
                number: torch.randn(batch, feature.channels, feature.height, feature.width)
                for number, feature in held.features.items()
            },
        }
    return {name: everything[name] for name in head.reads}


def _measure(run: Run, options: ProfileOptions) -> tuple[dict[str, float], float, float]:
    """Return mean seconds by part, and the fastest and slowest of as many batches without parts."""

    def clock() -> float:
        wait_for_device(options.device)
        return time.perf_counter()

    run(Meter(lambda: 0.0))  # a warm-up
    meter, whole = Meter(clock), []
    for _ in range(options.repeats):
        run(meter)
        start = clock()
        run(Meter(lambda: 0.0))
        whole.append(clock() - start)
    means = {part: seconds / options.repeats for part, seconds in meter.totals.items()}
    return means, min(whole), max(whole)


def _count_parts(run: Run) -> dict[str, float]:
    """Return part to its FLOPs; ``run`` is on the meta device, where attention is counted too."""
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
