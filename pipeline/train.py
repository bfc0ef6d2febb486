"""Fitting a head from a store: one worker's loop, without Ray.

Data flow: (seed, epoch, position) -> pair numbers of this worker's share of the global batch ->
batches read ahead by a thread -> loss -> AdamW -> averaged weights -> validation and checkpoints
by rank 0. Step ``s`` sees the same pairs and draws whatever the number of workers.
"""

import copy
import json
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from models.head import Head
from models.heads import HEADS
from models.noise import draw_integer
from pipeline.checkpoint import (
    CheckpointRecord,
    collect_training,
    find_checkpoint,
    load_checkpoint,
    load_training,
    restore_training,
    save_checkpoint,
)
from pipeline.evaluate import score_head
from pipeline.fetch_model import fetch_model
from pipeline.layers import find_model
from pipeline.order import count_steps, shuffle_positions, split_batch
from pipeline.reader import Batch, PairReader, Source, move_inputs
from pipeline.spec import LayerSpec, SpecError
from pipeline.train_config import HeadConfig, TrainConfig

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
READ_AHEAD = 2  # batches
EVALUATION_BATCH = 32


@dataclass(frozen=True, slots=True)
class Worker:
    """One of the processes that fit a head together."""

    rank: int
    num_workers: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of ``metrics.jsonl`` a logged step."""

    step: int
    loss: float  # mean over the global batch, averaged over the steps since the last record
    learning_rate: float
    grad_norm: float  # before clipping
    pairs_per_s: float
    data_wait: float  # share of the time spent waiting for batches


def build_head(config: HeadConfig, latents: LayerSpec, features: LayerSpec | None) -> Head:
    """Build a head for a store's layers, its weights from the LDM's UNet or afresh.

    Raises:
        ModelFilesError: the LDM's files are not there or not those of the layer.
    """
    source = latents.source
    if features is not None:
        folder = find_model(features, name=config.model)
    else:
        folder = fetch_model(config.model or source["model"], revision=source["revision"])
    options: dict[str, Any] = {}
    if config.name in ("ldznet", "probe"):
        options["blocks"] = config.blocks
    if config.name == "ldznet":
        options |= {"fusion": config.fusion, "size_px": latents.latents.size}
    if config.name == "probe":
        options["width"] = config.width
    kind = HEADS[config.name]
    if config.initialise == "random" or config.name == "probe":  # a probe has no layer of the LDM
        unet_config = UNet2DConditionModel.load_config(folder, subfolder="unet")
        return kind.from_ldm_config(unet_config, **options)
    unet = UNet2DConditionModel.from_pretrained(
        folder, subfolder="unet", variant=source["variant"], use_safetensors=True
    )
    return kind.from_ldm(unet, **options)


def open_readers(config: TrainConfig, source: Source) -> tuple[PairReader, PairReader]:
    """Return the readers of the training and the validation pairs.

    Raises:
        SpecError: the store lacks what the head reads, or a split is empty.
    """
    inputs = HEADS[config.head.name].inputs
    blocks = config.head.blocks if "features" in inputs else ()
    train, validation = (
        PairReader(source, tasks=tasks, inputs=inputs, blocks=blocks)
        for tasks in (config.data.train, config.data.validation)
    )
    shared = sorted(set(train.tasks) & set(validation.tasks))
    if shared:
        raise SpecError(
            f"data: {len(shared)} tasks match both train {config.data.train!r} and validation "
            f"{config.data.validation!r}, such as {shared[0]}; give globs that do not overlap"
        )
    return train, validation


def check_resumable(config: TrainConfig, record: CheckpointRecord) -> None:
    """Check that a config goes on with a checkpoint's run.

    Raises:
        SpecError: another value than the run's of what changes its steps.
    """
    fields = {"num_steps", "log_every", "validate_every", "validation_pairs", "checkpoint_every"}
    _, earlier = record.require_run()
    ours, theirs = (c.model_dump(exclude=fields) for c in (config, earlier))
    ours["head"].pop("model")
    theirs["head"].pop("model")
    changed = sorted(key for key in ours if ours[key] != theirs[key])
    if changed:
        raise SpecError(
            f"--resume: the checkpoint at step {record.step} was trained with another config: "
            f"{', '.join(changed)} differ; give its config, or another --out"
        )


def fit(config: TrainConfig, source: Source, out: Path, worker: Worker, *, resume: bool) -> None:
    """Fit a head and leave checkpoints and ``metrics.jsonl`` under ``out``.

    With more than one worker, torch's process group must be initialised.

    Raises:
        SpecError: the store does not hold what the head reads; there is nothing to resume from,
            or it was another run.
        FloatingPointError: the loss is NaN or infinite; the last checkpoint stays.
    """
    _Fit(config, source, out, worker).run(resume=resume)


class _Fit:
    def __init__(self, config: TrainConfig, source: Source, out: Path, worker: Worker) -> None:
        torch.manual_seed(config.seed)
        self.config, self.source, self.out, self.worker = config, source, out, worker
        self.train, self.validation = open_readers(config, source)
        self.head = build_head(config.head, source.latents, source.features).to(worker.device)
        if config.head.start_at_prior:
            area = float(self.train.index["mask_area"].to_numpy().mean(dtype=np.float64))
            self.head.start_at_prior(area)
        if config.gradient_checkpointing:
            self.head.enable_gradient_checkpointing()
        self.average = copy.deepcopy(self.head).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.model: nn.Module = self.head
        if worker.num_workers > 1:
            ids = [worker.device.index] if worker.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(self.head, device_ids=ids)
        self.first_step = 0
        self.recent: list[tuple[float, float]] = []  # loss, gradient norm
        self.waited_s = 0.0
        self.logged_at_s = time.monotonic()

    def run(self, *, resume: bool) -> None:
        if resume:
            self.restore()
        self.model.train()
        for step, batch in self.read_ahead():
            loss, norm = self.take_step(step, batch)
            self.recent.append((loss, norm))
            done = step + 1
            last = done == self.config.num_steps
            if self.worker.rank == 0:
                if last or done % self.config.log_every == 0:
                    self.log(done)
                validate = last or done % self.config.validate_every == 0
                scores = self.validate(done) if validate else {}
                if last or done % self.config.checkpoint_every == 0:
                    self.save(done, scores)

    def read_ahead(self) -> Iterator[tuple[int, Batch | None]]:
        """Yield (step, this worker's share of its batch), read by a thread in advance."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as pool:
            pending: list[tuple[int, Future[Batch | None]]] = []
            for step in range(self.first_step, self.config.num_steps):
                pending.append((step, pool.submit(self.read_step, step)))
                if len(pending) > READ_AHEAD:
                    yield self.wait(*pending.pop(0))
            for step, future in pending:
                yield self.wait(step, future)

    def wait(self, step: int, future: Future[Batch | None]) -> tuple[int, Batch | None]:
        start = time.monotonic()
        batch = future.result()
        self.waited_s += time.monotonic() - start
        return step, batch

    def read_step(self, step: int) -> Batch | None:
        """Read this worker's pairs of a step; None where the epoch's last batch leaves it none."""
        num, config = len(self.train), self.config
        epoch, in_epoch = divmod(step, count_steps(num, config.batch_size))
        positions = split_batch(
            in_epoch,
            num=num,
            batch=config.batch_size,
            rank=self.worker.rank,
            num_workers=self.worker.num_workers,
        )
        if not len(positions):
            return None
        numbers = shuffle_positions(positions, num=num, seed=config.seed, epoch=epoch)
        draws = [
            draw_integer(
                0,
                self.train.num_draws,
                purpose="train-draw",
                seed=config.seed,
                key=str(number),
                view=epoch,
                draw=0,
            )
            for number in numbers
        ]
        return self.train.read(numbers, draws=draws)

    def take_step(self, step: int, batch: Batch | None) -> tuple[float, float]:
        """Take one optimizer step; return the global batch's mean loss and the gradient norm."""
        rate = self.config.learning_rate * rate_factor(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        num, size = len(self.train), self.config.batch_size
        in_epoch = step % count_steps(num, size)
        num_global = len(split_batch(in_epoch, num=num, batch=size, rank=0, num_workers=1))
        # DDP averages gradients over workers: each worker's sum over the global count, times the
        # workers, averages to the gradient of the global batch's mean, whatever the shares.
        share = self.worker.num_workers / num_global
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.compute_loss(batch) * share
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.head.parameters(), self.config.clip_norm)
        mean = self.reduce_mean(loss.detach())
        if not (math.isfinite(mean) and math.isfinite(float(norm))):
            raise FloatingPointError(
                f"step {step + 1}: the loss is {mean}, the gradient's norm {norm}; the last "
                f"checkpoint under {self.out / 'checkpoints'} stays. Lower learning_rate or add "
                "warmup_steps"
            )
        self.optimizer.step()
        self.update_average(step)
        return mean, float(norm)

    def compute_loss(self, batch: Batch | None) -> Tensor:
        """Sum over pairs of the mean binary cross-entropy with logits over pixels."""
        weight = 1.0
        if batch is None:  # every worker takes part in the reduction, with weight 0
            batch, weight = self.train.read([0], draws=[0]), 0.0
        device = self.worker.device
        bfloat16 = self.config.precision == "bfloat16" or (
            self.config.precision == "auto" and device.type == "cuda"
        )
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            logits = self.model(**move_inputs(batch.inputs, device))
        mask = batch.mask.to(device)[:, None].float()
        losses = F.binary_cross_entropy_with_logits(logits.float(), mask, reduction="none")
        return losses.mean(dim=(1, 2, 3)).sum() * weight

    def reduce_mean(self, loss: Tensor) -> float:
        if self.worker.num_workers > 1:
            torch.distributed.all_reduce(loss)
            loss = loss / self.worker.num_workers
        return float(loss)

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Move the averaged weights: decay min(ema_decay, (1 + step) / (10 + step))."""
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        ours, theirs = self.average.state_dict(), self.head.state_dict()
        for name, value in ours.items():
            if value.is_floating_point():
                value.lerp_(theirs[name], 1 - decay)
            else:
                value.copy_(theirs[name])

    def log(self, done: int) -> None:
        now = time.monotonic()
        elapsed = max(now - self.logged_at_s, 1e-9)
        losses, norms = zip(*self.recent, strict=True)
        record = StepRecord(
            step=done,
            loss=float(np.mean(losses)),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            grad_norm=float(np.mean(norms)),
            pairs_per_s=len(self.recent) * self.config.batch_size / elapsed,
            data_wait=self.waited_s / elapsed,
        )
        self.append_record(asdict(record))
        self.recent, self.waited_s, self.logged_at_s = [], 0.0, now

    def validate(self, done: int) -> dict[str, float]:
        """Score the averaged weights on the first pairs of the validation order."""
        num = len(self.validation)
        numbers = shuffle_positions(
            np.arange(min(num, self.config.validation_pairs)), num=num, seed=0, epoch=0
        )
        scores = score_head(
            self.average,
            self.validation,
            np.sort(numbers),
            device=self.worker.device,
            batch=EVALUATION_BATCH,
        )
        figures = {"mIoU": scores.mIoU, "IoU_FG": scores.IoU_FG, "AP": scores.AP}
        self.append_record({"step": done, "validation": figures})
        return figures

    def append_record(self, record: dict[str, object]) -> None:
        with (self.out / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, done: int, scores: dict[str, float]) -> None:
        record = CheckpointRecord(
            step=done,
            store=self.source.store.storage.url,
            snapshot=self.source.snapshot.digest,
            latents=self.source.latents,
            features=self.source.features,
            train=self.config,
            validation=scores,
        )
        training = collect_training(self.head, self.optimizer)
        save_checkpoint(self.out, self.average, record, training)

    def restore(self) -> None:
        folder = find_checkpoint(self.out)
        average, record = load_checkpoint(folder)
        check_resumable(self.config, record)
        restore_training(self.head, self.optimizer, load_training(folder))
        self.average.load_state_dict(average.state_dict())
        self.first_step = record.step


def rate_factor(config: TrainConfig, step: int) -> float:
    """Return the learning rate at a step over the config's: warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / (config.num_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))
