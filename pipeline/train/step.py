"""One optimizer step of a head, over all workers and accumulation passes.

Data flow: a pass's batch -> logits, in bfloat16 if asked -> the sum over its pairs of the mean
binary cross-entropy, divided by the global number of pairs -> gradients summed over passes, then
over workers -> clipped -> AdamW -> averaged weights. However a step's pairs are divided among
workers and passes, the gradient is that of the mean loss over all of them. A pair's mean is over
its pixels that are not ignored; where all are, it adds 0, and is one of the global number still.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.heads.head import Head
from pipeline.read.batch import PairBatch, move_inputs
from pipeline.runs.config import TrainConfig
from pipeline.runs.state import restore_training

PLATEAU_FACTOR = 0.5  # LD-ZNet's (PNVR et al., ICCV 2023, section 4), as is the patience
PLATEAU_PATIENCE = 1  # validations without a better score before the rate is reduced
PLATEAU_THRESHOLD = 1e-4  # least relative improvement, PyTorch's default


class LearningRate:
    """The learning-rate schedule, a warm-up that climbs to a curve; ``state`` is JSON-able."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        # num_worse counts the validations since the best, or since the rate was halved.
        self.state: dict[str, Any] = {"factor": 1.0, "best": None, "num_worse": 0}
        self.state |= {"warmup_from": 0, "curve_from": config.warmup_steps}  # steps

    def resume(self, state: Mapping[str, Any], *, earlier: TrainConfig, step: int) -> None:
        """Take up the state of a checkpoint at ``step``; a changed warm-up begins there."""
        self.state |= {"curve_from": earlier.warmup_steps} | dict(state)  # older versions had less
        if self._config.warmup_steps != earlier.warmup_steps:
            self.state["warmup_from"] = step

    def at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        config, since = self._config, step - int(self.state["warmup_from"])
        rate = config.learning_rate
        if config.schedule == "cosine":
            begin = int(self.state["curve_from"])
            progress = max(0, step - begin) / max(1, config.num_steps - begin)
            rate = rate * 0.5 * (1 + math.cos(math.pi * progress))
        elif config.schedule == "plateau":
            rate *= float(self.state["factor"])
        return rate * (since + 1) / config.warmup_steps if since < config.warmup_steps else rate

    def update_plateau(self, score: float) -> None:
        """Halve the rate at the second validation in a row that is not better than the best.

        This is PyTorch's ReduceLROnPlateau(mode="max", factor=0.5, patience=1); a schedule other
        than ``plateau`` ignores the score.
        """
        if self._config.schedule != "plateau":
            return
        state = self.state
        if state["best"] is None or score > state["best"] * (1 + PLATEAU_THRESHOLD):
            state |= {"best": score, "num_worse": 0}
            return
        state["num_worse"] += 1
        if state["num_worse"] > PLATEAU_PATIENCE:
            state |= {"factor": state["factor"] * PLATEAU_FACTOR, "num_worse": 0}


class HeadTrainer:
    """A head with its optimizer, learning-rate schedule and averaged weights.

    ``head`` has the raw weights and ``average`` those that are evaluated. ``model`` is the head, or
    with several workers torch's DistributedDataParallel around it; then the process group must be
    initialised. ``stopping`` tells after a step whether a worker asked to end.
    """

    def __init__(
        self,
        config: TrainConfig,
        head: Head,
        *,
        device: torch.device,
        num_workers: int = 1,
        stand_in: PairBatch | None = None,  # with several workers: used for a batch that is None
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
        self._no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
        if num_workers > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.model = shared = nn.parallel.DistributedDataParallel(self.head, device_ids=ids)
            self._no_sync = shared.no_sync
        self.rate = LearningRate(config)
        self.stopping = False
        self._config, self._num_workers, self._stand_in = config, num_workers, stand_in
        self._bfloat16 = config.uses_bfloat16(device.type)
        theirs, ours = self.head.state_dict(), self.average.state_dict()
        floats = [name for name, value in ours.items() if value.is_floating_point()]
        self._averaged = ([ours[name] for name in floats], [theirs[name] for name in floats])
        self._copied = [(ours[name], theirs[name]) for name in ours if name not in set(floats)]

    def restore(self, average: Head, training: Mapping[str, Tensor]) -> None:
        """Load the averaged head and the training state of a checkpoint."""
        restore_training(self.head, self.optimizer, training)
        self.average.load_state_dict(average.state_dict())

    def train_step(
        self, passes: Sequence[PairBatch | None], *, num_global: int, step: int, stop: bool = False
    ) -> tuple[float, float]:
        """Make an optimizer step; return the mean loss over all pairs and the gradient's norm.

        Args:
            passes: This worker's batch of each pass; None, or empty, if it has no pairs.
            num_global: Pairs of the step over all workers and passes.
            step: Counted from 0; sets the learning rate and the decay of the averaged weights.
            stop: Asks all workers to end after this step, by ``stopping``.

        Raises:
            FloatingPointError: loss or gradient is NaN or infinite; the weights are unchanged.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate.at(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._accumulate_gradients(list(passes) or [None], num_global)
        norm_tensor = nn.utils.clip_grad_norm_(self.head.parameters(), self._config.clip_norm)
        mean = self._average_over_workers(loss, stop)
        norm = float(norm_tensor)  # unclipped
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {step + 1}: the loss is {mean}, the gradient's norm {norm}"
            )
        self.optimizer.step()
        self._move_average(step)
        return mean, norm

    def _accumulate_gradients(self, passes: Sequence[PairBatch | None], num_global: int) -> Tensor:
        """Run each pass forward and backward; return the sum of their losses."""
        # DDP averages gradients over workers, so each worker's loss is multiplied by their number.
        scale = self._num_workers / num_global
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(passes):
            if batch is None and self._num_workers == 1:
                continue
            last = number == len(passes) - 1  # in which alone the workers exchange gradients
            with nullcontext() if last else self._no_sync():
                loss = self._sum_losses(batch) * scale
                loss.backward()
            total += loss.detach()
        return total

    def _sum_losses(self, batch: PairBatch | None) -> Tensor:
        """Sum over pairs of the mean binary cross-entropy with logits over counted pixels."""
        weight = 1.0
        if batch is None:  # every worker must exchange gradients: this one's count nothing
            assert self._stand_in is not None
            batch, weight = self._stand_in, 0.0
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
            logits = self.model(**move_inputs(batch.inputs, self.device))
        mask = batch.truth.to(self.device, non_blocking=True)[:, None].float()
        losses = F.binary_cross_entropy_with_logits(logits.float(), mask, reduction="none")
        if batch.ignore is None:
            return losses.mean(dim=(1, 2, 3)).sum() * weight
        counts = 1 - batch.ignore.to(self.device, non_blocking=True)[:, None].float()
        num_counted = counts.sum(dim=(1, 2, 3)).clamp(min=1)
        return ((losses * counts).sum(dim=(1, 2, 3)) / num_counted).sum() * weight

    def _average_over_workers(self, loss: Tensor, stop: bool) -> float:
        """Return the workers' mean loss, and set ``stopping`` if any of them asks to end."""
        self.stopping = stop
        if self._num_workers == 1:
            return float(loss)
        both = torch.stack([loss, loss.new_tensor(float(stop))])
        torch.distributed.all_reduce(both)
        total, votes = both.tolist()
        self.stopping = votes > 0
        return float(total) / self._num_workers

    @torch.no_grad()
    def _move_average(self, step: int) -> None:
        """Update the averaged weights with decay min(ema_decay, (1 + step) / (10 + step)).

        The ramp, that of TensorFlow's ExponentialMovingAverage, soon forgets the initial weights.
        """
        decay = min(self._config.ema_decay, (1 + step) / (10 + step))
        ours, theirs = self._averaged
        get_ema_multi_avg_fn(decay)(ours, theirs, 0)
        for value, other in self._copied:
            value.copy_(other)
