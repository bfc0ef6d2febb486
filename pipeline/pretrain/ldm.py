"""Training UNet and text encoder together, on the latents of a store.

Data flow: pairs in the epoch's order -> latents from the store, prompts from phrases, some dropped
-> noise at a timestep -> the UNet's ε against the noise that was added. The text encoder trains
too, so the store's own embeddings are not read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from models.ldm.sd14 import SD14_SCHEDULE
from models.tiny.losses import (
    NUM_BUCKETS,
    Noised,
    draw_timesteps,
    mean_by_bucket,
    predict_error,
    weigh_timesteps,
)
from pipeline.base.machine import choose_device
from pipeline.base.yaml import SpecError
from pipeline.pretrain.config import LdmConfig
from pipeline.pretrain.loop import PretrainLoop, list_items, open_autocast, seed_step
from pipeline.pretrain.state import find_last_state, read_record
from pipeline.read.reader import PairReader
from pipeline.read.source import open_layers
from pipeline.spec.fields import NUM_TIMESTEPS
from pipeline.store.store import Store

STAGE = "ldm"
_INPUTS = frozenset({"latent"})
_NOISE, _PROMPTS = 1, 2  # purposes of a step's random numbers
_SCORED = 64  # validation pairs, each at the middle of every tenth of the timesteps


@dataclass(frozen=True)
class PhaseData:
    """What a phase reads: the pairs of one latents layer."""

    first_step: int
    train: PairReader
    validation: PairReader


def open_phases(store_url: str, config: LdmConfig) -> list[PhaseData]:
    """Open the latents layer of each phase's size.

    Raises:
        SpecError: a size has no layer, or more than one.
    """
    store = Store.open(store_url)
    layers = [layer for layer in store.list_layers() if layer.kind == "latents"]
    phases, first = [], 0
    for phase in config.phases:
        fit = [layer for layer in layers if layer.latents.size == phase.size]
        if len(fit) != 1:
            raise SpecError(
                f"{store_url}: expected one latents layer of {phase.size} px, got {len(fit)}; run "
                "--stage encode, or remove the store"
            )
        source = open_layers(store, latents=fit[0].folder, reads_features=False, write=True)
        train, validation = (
            PairReader(source, tasks=tasks, inputs=_INPUTS, masks=False)
            for tasks in ("*train*", "*val*")
        )
        phases.append(PhaseData(first, train, validation))
        first += phase.num_steps
    return phases


class LdmObjective:
    """The denoising loss of a step, and its figures on validation pairs."""

    def __init__(self, config: LdmConfig, phases: list[PhaseData], device: torch.device) -> None:
        self.config, self.phases, self.device = config, phases, device
        schedule = DDPMScheduler.from_config(dict(SD14_SCHEDULE))
        self.alphas_cumprod = schedule.alphas_cumprod.to(device)

    def compute_losses(self, model: Any, step: int) -> dict[str, Tensor]:
        """Return the weighted loss of a step, and the plain error by timestep."""
        config = self.config
        latent, prompts = self.read_step(step)
        generator = seed_step(config.seed, step, purpose=_NOISE)
        timestep = draw_timesteps(len(prompts), num_timesteps=config.timesteps, generator=generator)
        noised = self._add_noise(latent, timestep, generator)
        with open_autocast(config, self.device):
            text = model["text"](prompts).tokens
            error = predict_error(model["unet"], noised, text, self.alphas_cumprod)
        floor = config.phases[self.find_phase(step)].snr_floor
        weight = weigh_timesteps(
            noised.timestep_B, self.alphas_cumprod, gamma=config.min_snr, floor=floor
        )
        plain = error.detach()
        return {
            "loss": (error * weight).mean(),
            "error": plain.mean(),
            **mean_by_bucket(plain, noised.timestep_B, num_timesteps=NUM_TIMESTEPS),
        }

    def find_phase(self, step: int) -> int:
        """Return the number of the phase that a step is in."""
        return max(i for i, phase in enumerate(self.phases) if phase.first_step <= step)

    def read_step(self, step: int) -> tuple[Tensor, list[str]]:
        """Return the scaled latents (B, 4, h, w) float32 and the prompts of a step."""
        number = self.find_phase(step)
        phase, size = self.phases[number], self.config.phases[number].batch_size
        pairs = list_items(
            step - phase.first_step, size, num=len(phase.train), seed=self.config.seed, part=number
        )
        batch = phase.train.read(pairs, draws=[0] * size)
        return batch.inputs["latent"], self.format_prompts(batch.phrases, step)

    def format_prompts(self, phrases: tuple[str, ...], step: int) -> list[str]:
        """Return each phrase in a template, or the empty prompt where it is dropped."""
        generator = seed_step(self.config.seed, step, purpose=_PROMPTS)
        drawn = torch.rand(len(phrases), 2, generator=generator).tolist()
        templates = self.config.prompts
        return [
            "" if drop < self.config.drop_prompt else templates[int(at * len(templates))].format(p)
            for p, (drop, at) in zip(phrases, drawn, strict=True)
        ]

    def _add_noise(self, latent: Tensor, timestep: Tensor, generator: torch.Generator) -> Noised:
        noise = torch.randn(latent.shape, generator=generator)
        device = self.device
        return Noised(latent.to(device), noise.to(device), timestep.to(device))

    @torch.no_grad()
    def validate(self, model: Any, *, empty: bool = False) -> dict[str, float]:
        """Return the unweighted error by tenth of the timesteps, on fixed pairs and noise.

        ``empty`` gives every pair the empty prompt.
        """
        reader = self.phases[-1].validation
        num = min(_SCORED, len(reader))
        pairs = np.linspace(0, len(reader) - 1, num).astype(np.int64)
        batch = reader.read(pairs, draws=[0] * num)
        template = "" if empty else self.config.prompts[0]
        text = model["text"]([template.format(phrase) for phrase in batch.phrases]).tokens
        figures = {}
        for bucket in range(NUM_BUCKETS):
            timestep = (2 * bucket + 1) * NUM_TIMESTEPS // (2 * NUM_BUCKETS)
            generator = seed_step(0, bucket, purpose=_NOISE)
            noised = self._add_noise(
                batch.inputs["latent"], torch.full((num,), timestep), generator
            )
            error = predict_error(model["unet"], noised, text, self.alphas_cumprod)
            figures[f"t{timestep}"] = float(error.mean())
        return {"error": sum(figures.values()) / len(figures), **figures}


def train_ldm(
    config: LdmConfig, store_url: str, model: nn.ModuleDict, out: Path, *, resume: bool
) -> None:
    """Train ``model``'s ``unet`` and ``text`` encoder; checkpoints are below ``out / STAGE``."""
    if resume:
        check_phases(config, out / STAGE)
    device = choose_device(None)
    objective = LdmObjective(config, open_phases(store_url, config), device)
    PretrainLoop(out / STAGE, model, config, objective, device).run(resume=resume)


def check_phases(config: LdmConfig, folder: Path) -> None:
    """Refuse a config whose phases differ from those that the last checkpoint was trained with.

    Raises:
        SpecError: the last checkpoint in ``folder`` has other phases.
    """
    state = find_last_state(folder)
    if state is not None:
        record = read_record(state)
        try:
            config.check_begun(LdmConfig.model_validate(record["config"]), int(record["step"]))
        except ValueError as error:
            raise SpecError(f"{state}: {error}; give its phases, or another --out") from error
