"""The training loop of both pretraining stages: AdamW, averaged weights, figures, checkpoints.

What a step computes depends on the weights and its number alone: its random numbers come from
generators seeded by (seed, step). So a run that is killed and resumed ends as an undisturbed one.
"""

import copy
import json
import logging
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.base.yaml import SpecError
from pipeline.pretrain.config import LdmConfig, LoopConfig, VaeConfig
from pipeline.pretrain.state import (
    find_last_state,
    load_average,
    load_state,
    read_record,
    save_state,
)
from pipeline.read.order import shuffle_positions
from pipeline.runs.resume import list_changes
from pipeline.train.log import METRICS, remove_later_records

logger = logging.getLogger(__name__)

_FREE = {  # a resumed run may have other values; the stage that has phases checks them
    *("num_steps", "phases", "learning_rate"),
    *("log_every", "validate_every", "checkpoint_every"),
}


class Objective(Protocol):
    """What a stage minimises and how it is validated."""

    def compute_losses(self, model: Any, step: int) -> Mapping[str, Tensor]:
        """Return a step's ``loss``, which is minimised, and scalars to log beside it."""

    def validate(self, model: Any) -> dict[str, float]:
        """Return figures of the averaged model."""


def seed_step(seed: int, step: int, *, purpose: int) -> torch.Generator:
    """A generator on the CPU for one step; each ``purpose`` has a stream of its own."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 8 + purpose)


def list_items(step: int, batch_size: int, *, num: int, seed: int, part: int = 0) -> np.ndarray:
    """Return which of ``num`` items a step reads, int64: each once an epoch, in shuffled order.

    ``part`` tells permutations of one seed apart.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // num
    found = [
        shuffle_positions(places[epochs == e] % num, num=num, seed=seed, epoch=int(e), part=part)
        for e in np.unique(epochs)
    ]
    return np.concatenate(found)


def open_autocast(config: LoopConfig, device: torch.device) -> torch.autocast:
    """Return the autocast context of a stage: bfloat16 where the config says so, else none."""
    enabled = config.precision == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)


class PretrainLoop:
    """Trains a model, with checkpoints and figures below ``folder``."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        config: VaeConfig | LdmConfig,
        objective: Objective,
        device: torch.device,
    ) -> None:
        self.folder, self.config, self.objective = folder, config, objective
        self.model = model.to(device)
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=config.betas,
        )
        self._recent: list[dict[str, float]] = []
        self._logged_at_s = time.monotonic()

    def run(self, *, resume: bool) -> None:
        """Take the steps that are left; the last checkpoint holds the averaged model.

        Raises:
            SpecError: there is a run in the folder and ``resume`` is false, or another config.
            FloatingPointError: the loss is NaN or infinite; the last checkpoint stays.
        """
        first, config = self._restore(resume=resume), self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_later_records(self.folder / METRICS, first)
        self._logged_at_s = time.monotonic()
        for step in range(first, config.num_steps):
            self._recent.append(self._take_step(step))
            done = step + 1
            last = done == config.num_steps
            if last or done % config.log_every == 0:
                self._log(done)
            if last or done % config.validate_every == 0:
                validation = self.objective.validate(self.average)
                self._append({"step": done, "validation": validation})
            if last or done % config.checkpoint_every == 0:
                save_state(
                    self.folder,
                    step=done,
                    model=self.model,
                    average=self.average,
                    optimizer=self.optimizer,
                    record={
                        "config": config.model_dump(mode="json"),
                        "num_threads": torch.get_num_threads(),
                    },
                )

    def _restore(self, *, resume: bool) -> int:
        """Load the last checkpoint, if there is one, and return its step."""
        state = find_last_state(self.folder)
        if state is None:
            return 0
        record = read_record(state)
        if not resume:
            raise SpecError(
                f"{self.folder}: holds a run at step {record['step']}; give --resume to go on with "
                "it, or another --out"
            )
        changed = list_changes(record["config"], self.config.model_dump(mode="json"), free=_FREE)
        if changed:
            raise SpecError(
                f"--resume: {state} was trained with another config: "
                f"{'; '.join(map(str, changed))}; give its config, or another --out"
            )
        load_state(state, self.model, self.optimizer)
        load_average(state, self.average)
        return int(record["step"])

    def _take_step(self, step: int) -> dict[str, float]:
        rate = self.config.learning_rate * rate_factor(self.config, step, self.config.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.objective.compute_losses(self.model, step)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        figures = {name: float(value.detach()) for name, value in losses.items()}
        figures["grad_norm"] = float(norm)
        if not all(math.isfinite(figures[name]) for name in ("loss", "grad_norm")):
            raise FloatingPointError(
                f"step {step + 1}: loss {figures['loss']}, gradient norm {float(norm)}; the last "
                f"checkpoint under {self.folder} stays. Lower learning_rate and give --resume"
            )
        self.optimizer.step()
        self._average_weights(step)
        return figures

    @torch.no_grad()
    def _average_weights(self, step: int) -> None:
        """Decay by min(ema_decay, (1 + step) / (10 + step)), to forget the first steps soon."""
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        for average, raw in pairs:
            average.lerp_(raw, 1 - decay)

    def _log(self, done: int) -> None:
        """Append the means of the steps since the last record."""
        now_s = time.monotonic()
        names = sorted({name for figures in self._recent for name in figures})
        means = {n: statistics.fmean(f[n] for f in self._recent if n in f) for n in names}
        rate = self.optimizer.param_groups[0]["lr"]
        speed = len(self._recent) / max(now_s - self._logged_at_s, 1e-9)
        self._append({"step": done, **means, "learning_rate": rate, "steps_per_s": speed})
        self._recent, self._logged_at_s = [], now_s

    def _append(self, record: Mapping[str, object]) -> None:
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        logger.info("%s: %s", self.folder.name, record)


def rate_factor(config: LoopConfig, step: int, num_steps: int) -> float:
    """Return what the config's learning rate is multiplied by: linear warm-up, 1, linear decay."""
    up = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    decay_steps = max(round(config.decay_share * num_steps), 1)
    down = min(1.0, (num_steps - step) / decay_steps)
    return up * down
