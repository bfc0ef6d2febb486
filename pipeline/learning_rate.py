"""The learning rate of each step: a linear warm-up, then constant, cosine or plateau."""

import math
from typing import Any

from pipeline.train_config import TrainConfig

PLATEAU_FACTOR = 0.5  # both as LD-ZNet's ReduceLROnPlateau (LDZNET.md, Training)
PLATEAU_PATIENCE = 1  # validations without a better score that are put up with
PLATEAU_THRESHOLD = 1e-4  # relative: PyTorch's default of what counts as better


class LearningRate:
    """A schedule. Its state is JSON-able and changes only where it is ``plateau``."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._factor = 1.0
        self._best: float | None = None
        self._num_worse = 0  # validations since the best, or since the rate was halved

    def at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        config = self._config
        if step < config.warmup_steps:
            return config.learning_rate * (step + 1) / config.warmup_steps
        if config.schedule == "cosine":
            progress = (step - config.warmup_steps) / (config.num_steps - config.warmup_steps)
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        return config.learning_rate * self._factor

    def hear(self, score: float) -> None:
        """Take note of a validation's score, of which more is better.

        With ``plateau`` the rate is halved at the second validation in a row that is not better
        than the best, as by PyTorch's ReduceLROnPlateau(mode="max", factor=0.5, patience=1).
        """
        if self._config.schedule != "plateau":
            return
        if self._best is None or score > self._best * (1 + PLATEAU_THRESHOLD):
            self._best, self._num_worse = score, 0
            return
        self._num_worse += 1
        if self._num_worse > PLATEAU_PATIENCE:
            self._factor, self._num_worse = self._factor * PLATEAU_FACTOR, 0

    def state(self) -> dict[str, Any]:
        """Return what ``restore`` takes, for a checkpoint."""
        return {"factor": self._factor, "best": self._best, "num_worse": self._num_worse}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` returned."""
        self._factor, self._best = state["factor"], state["best"]
        self._num_worse = state["num_worse"]
