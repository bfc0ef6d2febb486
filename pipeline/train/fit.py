"""Fitting a head from a store: one worker's loop, without Ray.

Data flow: batches read ahead (``train_data``) -> a step (``train_step``) -> every so often a record
of the loss, a validation that the workers share, a checkpoint that rank 0 writes. A checkpoint has
all that the loop goes on from: a run that was killed and resumed is the undisturbed run, on a CPU
bit for bit, on CUDA up to kernels that are not deterministic. On another kind of device, or in
another precision, it goes on with a warning.
"""

import copy
import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from models.heads.head import Head
from pipeline.evaluate.baselines import mean_area, sample_tasks
from pipeline.read.source import Source
from pipeline.runs.checkpoint import TRAINING, CheckpointRecord, load_checkpoint
from pipeline.runs.config import TrainConfig
from pipeline.runs.new_head import build_head
from pipeline.runs.resume import check_resumable, find_resume_point
from pipeline.train.data import TrainData, check_batch, open_readers, trace_path, trim_traces
from pipeline.train.log import METRICS, StepRecord
from pipeline.train.outputs import TrainOutputs
from pipeline.train.step import TrainStep
from pipeline.train.validation import Validation

__all__ = ["METRICS", "Worker", "check_resumable", "fit", "open_readers"]

logger = logging.getLogger(__name__)

LEAST_PRIOR = 1e-4  # a new head's first answer stays this far from never and from always


@dataclass(frozen=True, slots=True)
class Worker:
    """One of the processes that fit a head together."""

    rank: int
    num_workers: int
    device: torch.device


def never() -> bool:
    """Return False: nobody asks a run to end."""
    return False


def fit(
    config: TrainConfig,
    source: Source,
    out: Path,
    worker: Worker,
    *,
    resume: bool,
    should_stop: Callable[[], bool] = never,
) -> int:
    """Fit a head, leave checkpoints and logs under ``out``; return how many steps were made.

    With more than one worker, torch's process group must be initialised, and rank 0's ``resume``
    counts. ``should_stop`` is asked at every step and batch of a validation: where it says so in
    any worker, all end after that step with a checkpoint.

    Raises:
        SpecError: the store does not hold what the head reads; there is nothing to resume from,
            or it was another run.
        FloatingPointError: the loss is NaN or infinite; the last checkpoint stays.
        OSError: a checkpoint could not be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    return _Fit(config, source, out, worker, should_stop).run(resume=resume)


@dataclass
class _LoopState:
    """What the loop goes on from, beside weights and optimizer; in checkpoints as JSON."""

    loss_sum: float = 0.0  # since the last record
    norm_sum: float = 0.0
    num_summed: int = 0  # steps
    best: float | None = None  # validation figure so far
    unvalidated: bool = False  # the step's validation is due still: the run was asked to end


class _Timing:
    """Where the time since the last record went."""

    def __init__(self, waited_s: float) -> None:
        self.step_s = 0.0
        self.num_pairs = 0
        self.waited_before_s = waited_s


class _Fit:
    def __init__(
        self,
        config: TrainConfig,
        source: Source,
        out: Path,
        worker: Worker,
        should_stop: Callable[[], bool],
    ) -> None:
        self.config, self.source, self.out, self.worker = config, source, out, worker
        self.should_stop = should_stop
        rank, num_workers = worker.rank, worker.num_workers
        check_batch(config, num_workers=num_workers)
        self.train, self.validation = open_readers(config, source, device=worker.device)
        self.validated = Validation(
            config, self.validation, device=worker.device, rank=rank, num_workers=num_workers
        )
        trace = trace_path(out, rank) if config.trace_pairs else None
        self.data = TrainData(
            config, source, self.train, rank=rank, num_workers=num_workers, trace=trace
        )
        self.first_step = 0
        self.state = _LoopState()
        self.timing = _Timing(0.0)

    def run(self, *, resume: bool) -> int:
        torch.manual_seed(self.config.seed)
        rank, num_workers = self.worker.rank, self.worker.num_workers
        found = find_resume_point(
            self.out, resume=resume, rank=rank, num_workers=num_workers, device=self.worker.device
        )
        self.step = self.restore_step(*found) if found else self.make_step(self.build())
        trim_traces(self.out, first_step=self.first_step, rank=rank, num_workers=num_workers)
        if rank:
            return self.take_steps(None)
        outputs = TrainOutputs(
            self.config,
            self.source,
            self.out,
            self.validation,
            draw=self.validated.draw,
            first_step=self.first_step,
            device=self.worker.device,
        )
        with closing(outputs):
            return self.take_steps(outputs)

    def build(self) -> Head:
        head = build_head(self.config.head, self.source.latents, self.source.features)
        if self.config.head.start_at_prior:
            some = sample_tasks(self.source, self.train, choice=self.config.data.train_filter)
            head.start_at_prior(self.choose_prior(mean_area(some)))
        return head

    def choose_prior(self, area: float) -> float:
        """Return the share at which a new head starts: the masks' mean area, inside (0, 1)."""
        share = min(max(area, LEAST_PRIOR), 1 - LEAST_PRIOR)
        if share != area and not self.worker.rank:
            logger.warning(
                "data.train: the training masks cover %g of their views on average; the head "
                "starts at %g. If that is not meant, look at data.train_filter and the masks, or "
                "give head.start_at_prior: false to start at 0.5",
                area,
                share,
            )
        return share

    def make_step(self, head: Head) -> TrainStep:
        num_workers = self.worker.num_workers
        stand_in = self.data.read_stand_in() if num_workers > 1 else None
        return TrainStep(
            self.config,
            head,
            device=self.worker.device,
            num_workers=num_workers,
            stand_in=stand_in,
        )

    def restore_step(self, folder: Path, record: CheckpointRecord) -> TrainStep:
        """Return a checkpoint's, and go on from there."""
        check_resumable(self.config, record)
        average, _ = load_checkpoint(folder)
        step = self.make_step(copy.deepcopy(average))
        step.restore(average, load_file(folder / TRAINING))
        self.first_step = record.step
        if self.worker.num_workers > 1:  # before rank 0 renames and removes any
            torch.distributed.barrier()
        state = dict(record.loop)
        step.rate.restore(state.pop("rate", step.rate.state()))
        self.compare_arithmetic(state.pop("arithmetic", None))
        self.state = _LoopState(**state)
        self.forget_other_best(record)
        return step

    @property
    def arithmetic(self) -> str:
        """What the losses' last digits follow from, beside the config."""
        kind = self.worker.device.type
        return f"{'bfloat16' if self.config.uses_bfloat16(kind) else 'float32'} on {kind}"

    def compare_arithmetic(self, earlier: str | None) -> None:
        """Warn where the run computed otherwise before; older checkpoints do not say."""
        if earlier not in (None, self.arithmetic) and not self.worker.rank:
            logger.warning(
                "--resume: the run computed in %s until step %d and goes on in %s: its losses are "
                "not those of an undisturbed run. Give precision: and a device as before for those",
                earlier,
                self.first_step,
                self.arithmetic,
            )

    def forget_other_best(self, record: CheckpointRecord) -> None:
        """Forget the best score where it is of other validation pairs: they do not compare."""
        _, earlier = record.require_run()
        num = len(self.validation)
        before, now = (min(c.validation_pairs, num) for c in (earlier, self.config))
        if before == now or self.state.best is None:
            return
        if not self.worker.rank:
            logger.warning(
                "--resume: validation_pairs took %d pairs until step %d and takes %d now: the best "
                "score so far, %g, is forgotten; the next validation's checkpoint is OUT/best",
                before,
                self.first_step,
                now,
                self.state.best,
            )
        self.state.best = None

    def take_steps(self, outputs: TrainOutputs | None) -> int:
        done = self.first_step
        if self.state.unvalidated:
            self.conclude(done, outputs, validate=True, save=True)
            if self.step.leaving:
                return done
        steps = self.data.read_steps(done, self.config.num_steps)
        with closing(steps):
            start_s = time.perf_counter()
            for batches in steps:
                leave = self.should_stop()
                loss, norm = self.step.take(
                    batches.parts, num_global=batches.num_global, step=batches.step, leave=leave
                )
                done = batches.step + 1
                self.add(loss, norm, batches.num_global, time.perf_counter() - start_s)
                self.finish(done, outputs)
                if self.step.leaving:
                    break
                start_s = time.perf_counter()
        return done

    def add(self, loss: float, norm: float, num_pairs: int, step_s: float) -> None:
        self.state.loss_sum += loss
        self.state.norm_sum += norm
        self.state.num_summed += 1
        self.timing.num_pairs += num_pairs
        self.timing.step_s += step_s

    def finish(self, done: int, outputs: TrainOutputs | None) -> None:
        """Do what is due after ``done`` steps."""
        if outputs is not None:
            outputs.check()
        config = self.config
        last = done == config.num_steps
        if last or done % config.log_every == 0:
            self.log(done, outputs)
        validate = last or done % config.validate_every == 0
        save = last or done % config.checkpoint_every == 0
        self.conclude(done, outputs, validate=validate, save=save)

    def log(self, done: int, outputs: TrainOutputs | None) -> None:
        state, step_s = self.state, max(self.timing.step_s, 1e-9)
        record = StepRecord(
            step=done,
            loss=state.loss_sum / state.num_summed,
            learning_rate=self.step.learning_rate,
            grad_norm=state.norm_sum / state.num_summed,
            pairs_per_s=self.timing.num_pairs / step_s,
            data_wait=(self.data.waited_s - self.timing.waited_before_s) / step_s,
        )
        if outputs is not None:
            outputs.add_step(record)
        state.loss_sum, state.norm_sum, state.num_summed = 0.0, 0.0, 0
        self.timing = _Timing(self.data.waited_s)

    def conclude(
        self, done: int, outputs: TrainOutputs | None, *, validate: bool, save: bool
    ) -> None:
        """Validate and save, where due or where the run ends."""
        figures: dict[str, float] | None = None
        if validate and not self.step.leaving:
            figures = self.validated.score(self.step.average, should_stop=self.should_stop)
            self.step.leaving = figures is None
        self.state.unvalidated = validate and figures is None
        best = figures is not None and self.hear(figures[self.config.best_by])
        if outputs is None:
            return
        if figures is not None:
            outputs.add_validation(done, figures, self.step)
        if save or best or self.step.leaving:
            loop: dict[str, Any] = {
                **asdict(self.state),
                "rate": self.step.rate.state(),
                "arithmetic": self.arithmetic,
            }
            outputs.save(done, self.step, figures=figures or {}, loop=loop, best=best)

    def hear(self, score: float) -> bool:
        """Tell the schedule of a validation; return whether it is the best so far."""
        self.step.rate.hear(score)
        if self.state.best is not None and score <= self.state.best:
            return False
        self.state.best = score
        return True
