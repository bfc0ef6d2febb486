"""The loop of both pretraining stages: AdamW, averaged weights, figures, checkpoints.

What a step sees is a pure function of its number: each step's random numbers come from a generator
seeded by (seed, step), so that a run that is killed and resumed is the undisturbed one.
"""

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.base.whole_file import write_whole
from pipeline.base.yaml import SpecError
from pipeline.pretrain.config import LoopConfig
from pipeline.pretrain.state import list_states, load_average, load_state, read_record, save_state

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
Losses = Mapping[str, Tensor]  # "loss" is minimised, the others are logged beside it
TakeStep = Callable[[Any, int], Losses]  # of the model and the step's number
Validate = Callable[[Any], dict[str, float]]


def seed_step(seed: int, step: int, *, purpose: int) -> torch.Generator:
    """A generator on the CPU for one step; ``purpose`` tells streams of a step apart."""
    mixed = (seed * 1_000_003 + step) * 8 + purpose
    return torch.Generator().manual_seed(mixed)


def find_device() -> torch.device:
    """The first GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class PretrainLoop:
    """Fits a model under ``folder``; the averaged weights are what a stage is for."""

    def __init__(
        self,
        *,
        folder: Path,
        model: nn.Module,
        config: LoopConfig,
        num_steps: int,
        compute_losses: TakeStep,
        validate: Validate,
        device: torch.device,
    ) -> None:
        self.folder, self.config, self.num_steps = folder, config, num_steps
        self.model = model.to(device)
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.device = device
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=config.betas,
        )
        self._compute_losses, self._validate = compute_losses, validate
        self._recent: list[dict[str, float]] = []
        self._logged_at_s = time.monotonic()

    def run(self, *, resume: bool) -> nn.Module:
        """Take the steps that are left and return the averaged model.

        Raises:
            SpecError: there is a run in the folder and ``resume`` is false, or another config.
            FloatingPointError: the loss is NaN or infinite; the last checkpoint stays.
        """
        first = self._restore(resume=resume)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._drop_records(after=first)
        self._logged_at_s = time.monotonic()
        for step in range(first, self.num_steps):
            self._recent.append(self._take_step(step))
            done = step + 1
            last = done == self.num_steps
            if last or done % self.config.log_every == 0:
                self._log(done)
            if last or done % self.config.validate_every == 0:
                self._append({"step": done, "validation": self._validate(self.average)})
            if last or done % self.config.checkpoint_every == 0:
                self._save(done)
        return self.average

    def _restore(self, *, resume: bool) -> int:
        states = list_states(self.folder)
        if not states:
            return 0
        if not resume:
            raise SpecError(
                f"{self.folder}: holds a run at step {read_record(states[-1])['step']}; give "
                "--resume to go on with it, or another --out"
            )
        record = read_record(states[-1])
        ours = self.config.model_dump(mode="json")
        theirs = record["config"]
        free = {
            "num_steps",
            "phases",  # the stage that has them checks them
            "learning_rate",
            "log_every",
            "validate_every",
            "checkpoint_every",
        }
        changed = sorted(key for key in ours if key not in free and ours[key] != theirs.get(key))
        if changed:
            raise SpecError(
                f"--resume: {states[-1]} was trained with another config: {', '.join(changed)} "
                "differ; give its config, or another --out"
            )
        load_state(states[-1], self.model, self.optimizer)
        load_average(states[-1], self.average)
        return int(record["step"])

    def _take_step(self, step: int) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate_factor(self.config, step, self.num_steps)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._compute_losses(self.model, step)
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
        """Decay min(ema_decay, (1 + step) / (10 + step)): the first steps are soon forgotten."""
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        for ours, theirs in pairs:
            ours.lerp_(theirs, 1 - decay)

    def _log(self, done: int) -> None:
        now = time.monotonic()
        names = sorted({name for figures in self._recent for name in figures})
        means = {
            name: sum(found) / len(found)
            for name in names
            if (found := [figures[name] for figures in self._recent if name in figures])
        }
        rate = self.optimizer.param_groups[0]["lr"]
        speed = len(self._recent) / max(now - self._logged_at_s, 1e-9)
        self._append({"step": done, **means, "learning_rate": rate, "steps_per_s": speed})
        self._recent, self._logged_at_s = [], now

    def _append(self, record: Mapping[str, object]) -> None:
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        logger.info("%s: %s", self.folder.name, record)

    def _drop_records(self, *, after: int) -> None:
        """Drop the records of steps that will be taken again, and a line that was cut."""
        path = self.folder / METRICS
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n") and json.loads(line)["step"] <= after:
                kept.append(line)
        write_whole(path, "".join(kept))

    def _save(self, done: int) -> None:
        save_state(
            self.folder,
            step=done,
            model=self.model,
            average=self.average,
            optimizer=self.optimizer,
            record={
                "config": self.config.model_dump(mode="json"),
                "num_threads": torch.get_num_threads(),
            },
        )


def rate_factor(config: LoopConfig, step: int, num_steps: int) -> float:
    """The learning rate at a step over the config's: up, level, then down to 0 linearly."""
    up = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    decay_steps = max(round(config.decay_share * num_steps), 1)
    down = min(1.0, (num_steps - step) / decay_steps)
    return up * down
