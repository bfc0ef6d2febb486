"""One optimizer step of a head, over all workers and passes.

Data flow: a pass' batch -> logits, under bfloat16 where asked -> the sum over its pairs of the mean
binary cross-entropy, over the global count -> gradients summed over passes, then over workers ->
clipped -> AdamW -> the averaged weights. Whatever the shares, the gradient is that of the global
batch's mean.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.heads.head import Head
from pipeline.read.batch import Batch, move_inputs
from pipeline.runs.config import TrainConfig
from pipeline.runs.state import restore_training

PLATEAU_FACTOR = 0.5  # both LD-ZNet's (PNVR et al., ICCV 2023, section 4)
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


class TrainStep:
    """A head and what trains it.

    ``head`` has the raw weights, ``average`` those that are evaluated, ``model`` is what is called:
    the head, or with several workers torch's DistributedDataParallel around it, for which the
    process group must be initialised. ``leaving`` says after a step whether a worker asked to end.
    """

    def __init__(
        self,
        config: TrainConfig,
        head: Head,
        *,
        device: torch.device,
        num_workers: int = 1,
        stand_in: Batch | None = None,  # of several workers: for a part that is None
    ) -> None:
        self.device = device
        self.head = head.to(device).train()
        if config.gradient_checkpointing:
            self.head.enable_gradient_checkpointing()
        self.average = copy.deepcopy(self.head).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.model: nn.Module = self.head
        if num_workers > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(self.head, device_ids=ids)
        self.rate = LearningRate(config)
        self.leaving = False
        self._config, self._num_workers, self._stand_in = config, num_workers, stand_in
        self._bfloat16 = config.uses_bfloat16(device.type)
        theirs, ours = self.head.state_dict(), self.average.state_dict()
        floats = [name for name, value in ours.items() if value.is_floating_point()]
        self._averaged = ([ours[name] for name in floats], [theirs[name] for name in floats])
        self._copied = [(ours[name], theirs[name]) for name in ours if name not in set(floats)]

    @property
    def learning_rate(self) -> float:
        """The last step's."""
        return float(self.optimizer.param_groups[0]["lr"])

    def restore(self, average: Head, training: Mapping[str, Tensor]) -> None:
        """Put the state of a checkpoint back."""
        restore_training(self.head, self.optimizer, training)
        self.average.load_state_dict(average.state_dict())

    def take(
        self,
        parts: Sequence[Batch | None],
        *,
        num_global: int,
        step: int,
        leave: bool = False,
    ) -> tuple[float, float]:
        """Take a step; return the global batch's mean loss and the gradient's norm, unclipped.

        Args:
            parts: This worker's batches, one a pass; None, or none, where it has no pairs.
            num_global: Pairs of the step over all workers and passes.
            step: Counted from 0; sets the learning rate and the average's decay.
            leave: Asks all workers to end after this step: ``leaving`` says so to each.

        Raises:
            FloatingPointError: loss or gradient is NaN or infinite; nothing was changed.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate.at(step)
        self.optimizer.zero_grad(set_to_none=True)
        # DDP averages gradients over workers: each one's sum over the global count, times the
        # workers, averages to the gradient of the global batch's mean.
        share = self._num_workers / num_global
        total = torch.zeros((), device=self.device)
        passes = list(parts) or [None]
        for number, part in enumerate(passes):
            if part is None and self._num_workers == 1:
                continue
            with self._synced(number == len(passes) - 1):
                loss = self._sum_losses(part) * share
                loss.backward()
            total += loss.detach()
        norm_tensor = nn.utils.clip_grad_norm_(self.head.parameters(), self._config.clip_norm)
        mean = self._reduce(total, leave)
        norm = float(norm_tensor)
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {step + 1}: the loss is {mean}, the gradient's norm {norm}; the last "
                "checkpoint stays. Lower learning_rate or add warmup_steps"
            )
        self.optimizer.step()
        self._move_average(step)
        return mean, norm

    def _synced(self, last: bool) -> AbstractContextManager[None]:
        """Workers exchange gradients in the last pass alone."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def _sum_losses(self, part: Batch | None) -> Tensor:
        """Sum over pairs of the mean binary cross-entropy with logits over pixels."""
        weight = 1.0
        if part is None:  # every worker takes part in the exchange, this one with weight 0
            assert self._stand_in is not None
            part, weight = self._stand_in, 0.0
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
            logits = self.model(**move_inputs(part.inputs, self.device))
        mask = part.mask.to(self.device, non_blocking=True)[:, None].float()
        losses = F.binary_cross_entropy_with_logits(logits.float(), mask, reduction="none")
        return losses.mean(dim=(1, 2, 3)).sum() * weight

    def _reduce(self, loss: Tensor, leave: bool) -> float:
        """Return the mean over workers, and set ``leaving`` where one of them asks to end."""
        self.leaving = leave
        if self._num_workers == 1:
            return float(loss)
        both = torch.stack([loss, loss.new_tensor(float(leave))])
        torch.distributed.all_reduce(both)
        total, votes = both.tolist()
        self.leaving = votes > 0
        return float(total) / self._num_workers

    @torch.no_grad()
    def _move_average(self, step: int) -> None:
        """Move the averaged weights: decay min(ema_decay, (1 + step) / (10 + step)).

        The ramp is that of TensorFlow's ExponentialMovingAverage, so that early averages are not
        the fresh weights.
        """
        decay = min(self._config.ema_decay, (1 + step) / (10 + step))
        ours, theirs = self._averaged
        get_ema_multi_avg_fn(decay)(ours, theirs, 0)
        for value, other in self._copied:
            value.copy_(other)
