"""The training loop of one worker, without Ray.

Data flow: batches read ahead (``data``) -> an optimizer step (``step``) -> at intervals a record of
the loss, a validation that the workers share, and a checkpoint, the first and last by rank 0.

A resumed run gives the results of an undisturbed one: on a CPU bit for bit, on CUDA up to kernels
that are not deterministic; on another kind of device, or in another precision, with a warning.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from models.heads.head import Head
from pipeline.base.outages import PATIENCE, OutageError
from pipeline.evaluate.baselines import mean_area, sample_tasks
from pipeline.read.source import Source
from pipeline.runs.checkpoint import TRAINING, CheckpointRecord, load_checkpoint
from pipeline.runs.checkpoint_writer import check_room
from pipeline.runs.config import TrainConfig
from pipeline.runs.new_head import build_head
from pipeline.runs.resume import Change, check_resumable, find_resume_point
from pipeline.runs.state import count_checkpoint_bytes
from pipeline.train.data import (
    StepBatches,
    TrainData,
    Worker,
    check_batch,
    open_negatives,
    open_readers,
    trace_path,
    trim_traces,
)
from pipeline.train.log import StepRecord
from pipeline.train.outputs import TrainOutputs
from pipeline.train.step import HeadTrainer
from pipeline.train.validation import Validation

logger = logging.getLogger(__name__)

LEAST_PRIOR = 1e-4  # a new head's first probability is between this and 1 less this


def fit(
    config: TrainConfig,
    source: Source,
    out: Path,
    worker: Worker,
    *,
    resume: bool,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train a head, with checkpoints and logs under ``out``; return the number of its last step.

    With several workers, torch's process group must be initialised, and rank 0's ``resume``
    decides. ``should_stop`` is called at every step and at every batch of a validation: if it
    returns True in any worker, all end after that step, with a checkpoint.

    Raises:
        SpecError: the store does not hold what the head reads, there is no checkpoint to resume
            from, or it is of another run.
        FloatingPointError: the loss is NaN or infinite; the last checkpoint stays.
        OSError: a checkpoint could not be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    with PATIENCE.asking(should_stop):
        return _Fit(config, source, out, worker, should_stop).run(resume=resume)


@dataclass
class _LoopState:
    """State of the loop beside weights and optimizer; a checkpoint holds it as JSON."""

    loss_sum: float = 0.0  # of the steps since the last record
    norm_sum: float = 0.0
    num_summed: int = 0  # those steps
    best: float | None = None  # validation score of the run
    unvalidated: bool = False  # the run was asked to end before its last step was validated
    changes: list[dict[str, Any]] = field(default_factory=list)  # of the config, at a --resume


@dataclass
class _Timing:
    """Times and pairs since the last record."""

    waited_before_s: float
    step_s: float = 0.0
    num_pairs: int = 0


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
        check_batch(config, num_workers=worker.num_workers)
        self.reader, validation_reader = open_readers(config, source, device=worker.device)
        negatives = open_negatives(config, source, device=worker.device)
        self.validation = Validation(config, validation_reader, worker, negatives=negatives)
        trace = trace_path(out, worker.rank) if config.trace_pairs else None
        self.data = TrainData(config, source, self.reader, worker, trace=trace)
        self.first_step = 0
        self.state = _LoopState()
        self.figures: dict[str, float] = {}  # of the last validation
        self.timing = _Timing(0.0)
        self.outputs: TrainOutputs | None = None  # rank 0's

    def run(self, *, resume: bool) -> int:
        torch.manual_seed(self.config.seed)
        worker = self.worker
        found = find_resume_point(
            self.out,
            resume=resume,
            rank=worker.rank,
            num_workers=worker.num_workers,
            device=worker.device,
        )
        self.trainer = self.restore(*found) if found else self.make_trainer(self.build_head())
        trim_traces(self.out, worker, first_step=self.first_step)
        if worker.rank:
            return self.run_steps()
        num_bytes = count_checkpoint_bytes(self.trainer.head)
        check_room(self.out, self.config, num_bytes=num_bytes, first_step=self.first_step)
        self.outputs = TrainOutputs(
            self.config, self.source, self.out, self.validation, self.first_step, worker.device
        )
        with closing(self.outputs):
            return self.run_steps()

    def build_head(self) -> Head:
        head = build_head(self.config.head, self.source.latents, self.source.features)
        if self.config.head.start_at_prior and self.config.head.from_ is None:
            choice = self.config.data.train_filter
            area = mean_area(sample_tasks(self.source, self.reader, choice=choice))
            share = min(max(area, LEAST_PRIOR), 1 - LEAST_PRIOR)
            if share != area and not self.worker.rank:
                logger.warning(
                    "data.train: the training masks cover %g of their views on average; the head "
                    "starts at %g. If that is not meant, look at data.train_filter and the masks, "
                    "or give head.start_at_prior: false to start at 0.5",
                    *(area, share),
                )
            head.start_at_prior(share)
        return head

    def make_trainer(self, head: Head) -> HeadTrainer:
        device, num_workers = self.worker.device, self.worker.num_workers
        stand_in = self.data.read_stand_in() if num_workers > 1 else None
        return HeadTrainer(
            self.config, head, device=device, num_workers=num_workers, stand_in=stand_in
        )

    def restore(self, folder: Path, record: CheckpointRecord) -> HeadTrainer:
        """Load a checkpoint and the loop's state in it."""
        changes = check_resumable(self.config, record)
        average, _ = load_checkpoint(folder)
        trainer = self.make_trainer(copy.deepcopy(average))
        trainer.restore(average, load_file(folder / TRAINING))
        self.first_step = record.step
        if self.worker.num_workers > 1:  # before rank 0 renames and removes any
            torch.distributed.barrier()
        state = dict(record.loop)
        _, earlier = record.require_run()
        trainer.rate.resume(state.pop("rate", {}), earlier=earlier, step=record.step)
        self.compare_arithmetic(state.pop("arithmetic", None))
        self.state = _LoopState(**state)
        self.figures = record.validation if record.threshold is not None else {}
        self.note_changes(changes, trainer)
        return trainer

    def note_changes(self, changes: Sequence[Change], trainer: HeadTrainer) -> None:
        """Log what the config changes from here on; forget best scores that do not compare."""
        if not changes:
            return
        state, step, num = self.state, self.first_step, len(self.validation.reader)
        state.changes += [{"step": step, "field": c[0], "was": c[1], "is": c[2]} for c in changes]
        said = f"{'; '.join(map(str, changes))}; the next step's rate is {trainer.rate.at(step):g}"
        warm = trainer.rate.state["warmup_from"] + self.config.warmup_steps
        if warm > self.config.num_steps:
            said += f"; the warm-up ends at step {warm}, after num_steps"
        if any(change.tells_scores_apart(num) for change in changes):
            if state.best is not None:
                said += (
                    f"; the best score, {state.best:g}, is forgotten, for those to come do not "
                    "compare with it: the next validation's checkpoint is OUT/best"
                )
            state.best = None
            trainer.rate.state |= {"best": None, "num_worse": 0}
        if not self.worker.rank:
            logger.warning("--resume: from step %d on %s", step, said)

    @property
    def arithmetic(self) -> str:
        """Precision and kind of device, on which the last digits of the losses depend."""
        kind = self.worker.device.type
        return f"{'bfloat16' if self.config.uses_bfloat16(kind) else 'float32'} on {kind}"

    def compare_arithmetic(self, earlier: str | None) -> None:
        """Warn if the arithmetic has changed; checkpoints of older versions do not tell it."""
        if earlier not in (None, self.arithmetic) and not self.worker.rank:
            logger.warning(
                "--resume: the run computed in %s until step %d and goes on in %s: its losses are "
                "not those of an undisturbed run. Give precision: and a device as before for those",
                *(earlier, self.first_step, self.arithmetic),
            )

    def run_steps(self) -> int:
        done = self.first_step
        if self.state.unvalidated:
            self.validate_and_save(done, validate=True, save=True)
            if self.trainer.stopping:
                return done
        with closing(self.read_steps(done)) as steps:
            start_s = time.perf_counter()
            for batches in steps:
                loss, norm = self.trainer.train_step(
                    batches.passes,
                    num_global=batches.num_global,
                    step=batches.step,
                    stop=self.should_stop(),
                )
                done = batches.step + 1
                self.state.loss_sum += loss
                self.state.norm_sum += norm
                self.state.num_summed += 1
                self.timing.num_pairs += batches.num_global
                self.timing.step_s += time.perf_counter() - start_s
                self.finish_step(done)
                if self.trainer.stopping:
                    break
                start_s = time.perf_counter()
        return done

    def read_steps(self, done: int) -> Generator[StepBatches]:
        """Yield the batches of the steps that are left.

        A request to stop ends a wait for the store, and one worker alone can still leave a
        checkpoint of its last step.
        """
        with closing(self.data.read_steps(done, self.config.num_steps)) as steps:
            try:
                for batches in steps:
                    yield batches
                    done = batches.step + 1
            except OutageError:
                if done == self.first_step or self.worker.num_workers > 1 or not self.should_stop():
                    raise
                self.trainer.stopping = True
                self.validate_and_save(done, validate=False, save=True)

    def finish_step(self, done: int) -> None:
        """Log, validate and save, each if it is due after ``done`` steps."""
        if self.outputs is not None:
            self.outputs.writer.check()
        config = self.config
        last = done == config.num_steps
        if last or done % config.log_every == 0:
            self.log(done)
        validate = last or done % config.validate_every == 0
        save = last or done % config.checkpoint_every == 0
        self.validate_and_save(done, validate=validate, save=save)

    def log(self, done: int) -> None:
        state, step_s = self.state, max(self.timing.step_s, 1e-9)
        record = StepRecord(
            step=done,
            loss=state.loss_sum / state.num_summed,
            learning_rate=self.trainer.rate.at(done - 1),
            grad_norm=state.norm_sum / state.num_summed,
            pairs_per_s=self.timing.num_pairs / step_s,
            data_wait=(self.data.waited_s - self.timing.waited_before_s) / step_s,
        )
        if self.outputs is not None:
            self.outputs.log.add_step(record)
        state.loss_sum, state.norm_sum, state.num_summed = 0.0, 0.0, 0
        self.timing = _Timing(self.data.waited_s)

    def validate_and_save(self, done: int, *, validate: bool, save: bool) -> None:
        """Validate and save if asked to; also save the best step and the last one."""
        figures: dict[str, float] | None = None
        if validate and not self.trainer.stopping:
            figures = self.validation.score(self.trainer.average, should_stop=self.should_stop)
            self.trainer.stopping = figures is None
        self.state.unvalidated = validate and figures is None
        best = figures is not None and self.update_best(figures[self.config.best_by])
        if self.outputs is None:
            return
        if figures is not None:
            self.figures = figures
            self.outputs.add_validation(done, figures, self.trainer)
        if save or best or self.trainer.stopping:
            loop: dict[str, Any] = {
                **asdict(self.state),
                "rate": dict(self.trainer.rate.state),
                "arithmetic": self.arithmetic,
            }
            self.outputs.save(done, self.trainer, figures=self.figures, loop=loop, best=best)

    def update_best(self, score: float) -> bool:
        """Pass a validation's score to the schedule; return whether it is the best so far."""
        self.trainer.rate.update_plateau(score)
        if not score > (-math.inf if self.state.best is None else self.state.best):
            return False  # also where it is NaN, as of a head that has diverged
        self.state.best = score
        return True
