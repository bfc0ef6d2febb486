"""Time of a head's epoch from the cache, and with the inputs computed anew for each pair.

Data flow: the scratch store's layers -> the real head, reader and training step, timed -> with the
corpus' counts and the cost of encoding, a forecast of each head. Weights are random: values do not
change what an operation costs, and no file of gigabytes must be read.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch

from models.heads.registry import find_head_class
from pipeline.base.machine import wait_for_device
from pipeline.corpus.tasks import Task
from pipeline.plan.cost import EncodeCost
from pipeline.plan.estimate import NOTHING
from pipeline.plan.forecast import HeadForecast, format_seconds
from pipeline.plan.timing import EncodeTiming
from pipeline.read.reader import PairReader
from pipeline.read.source import Source
from pipeline.runs.config import HeadConfig, TrainConfig
from pipeline.runs.new_head import build_head
from pipeline.train.step import HeadTrainer

NUM_STEPS = 4  # measured, after one more that is not
BUDGET_S = 60.0
"""Time limit of one head's steps; a slow device gets a smaller batch."""


def open_reader(config: HeadConfig, source: Source) -> PairReader:
    """Open what a head reads of a store; SpecError where the store lacks some of it."""
    inputs = find_head_class(config.name).reads
    return PairReader(source, tasks="*", inputs=inputs, blocks=config.blocks)


def time_head(
    config: TrainConfig,
    source: Source,
    reader: PairReader,
    device: torch.device,
    *,
    say: Callable[[str], None],
) -> tuple[float, float]:
    """Train a head for some steps on what a store holds, and time them.

    ``say`` is called with what starts now, and about how long it takes.

    Returns:
        Seconds a pair of the training step, and of reading from files in the page cache.

    Raises:
        ModelFilesError: the LDM's files are not there.
    """
    name = config.head.name
    say(f"building {name} with random weights")
    random = config.head.model_copy(update={"initialise": "random"})
    trainer = HeadTrainer(
        config, build_head(random, source.latents, source.features), device=device
    )
    say(f"taking a first step of {name}")
    rng = np.random.default_rng(config.seed)
    _time_step(trainer, reader, 1, rng)  # loads kernels
    one_s, _ = _time_step(trainer, reader, 1, rng)
    affordable = int(BUDGET_S / (NUM_STEPS + 1) / max(one_s, 1e-6))
    num_rows = max(1, min(config.batch_size, affordable))
    most = format_seconds((NUM_STEPS + 1) * num_rows * one_s)
    say(f"taking {NUM_STEPS + 1} more steps of {name}, {num_rows} pairs each: at most about {most}")
    _time_step(trainer, reader, num_rows, rng)
    found = [_time_step(trainer, reader, num_rows, rng) for _ in range(NUM_STEPS)]
    step_s, read_s = (statistics.median(times) / num_rows for times in zip(*found, strict=True))
    return step_s, read_s


def _time_step(
    trainer: HeadTrainer, reader: PairReader, num_rows: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Return the seconds of one step, and of reading its batch."""
    numbers = rng.integers(len(reader), size=num_rows)
    draws = rng.integers(reader.num_draws, size=num_rows).tolist()
    start_s = time.perf_counter()
    batch = reader.read(numbers, draws=draws)
    read_s = time.perf_counter() - start_s
    trainer.train_step([batch], num_global=num_rows, step=0)
    wait_for_device(trainer.device)
    return time.perf_counter() - start_s - read_s, read_s


def forecast_head(
    config: TrainConfig,
    *,
    step_s: float,
    read_s: float,
    tasks: Sequence[Task],
    cost: EncodeCost,
    epochs: int | None,
) -> HeadForecast:
    """Compare the two ways to train a head on the corpus' pairs.

    Recomputing is what LD-ZNet's public code does: VAE, text encoder and one UNet pass for each
    pair in each epoch, as far as the head reads their results; here the UNet ends after the last
    block of the layer. On a GPU decoding and reading run at the same time as the steps; on a CPU
    their times add up.
    """
    counts, timing, on_gpu = cost.counts, cost.timing, cost.machines.on_gpu
    trained = [fnmatchcase(task.id, config.data.train) for task in tasks]
    share = float(counts.task_bytes[trained].sum() / counts.task_bytes.sum())
    pairs = counts.rows["trained"].scaled(share or 1.0)  # all, if no task matches
    computed_s = cost.machine_s_a_busy_s * recompute_busy(config, timing, on_gpu=on_gpu)
    cache_s = max(step_s, read_s) if on_gpu else step_s + read_s
    reads_features = bool(config.head.blocks)
    files = [
        size
        for (folder, _), size in counts.files.items()
        if reads_features or folder == timing.latents.folder
    ]
    steps = config.num_steps * config.batch_size / max(pairs.value, 1.0)
    return HeadForecast(
        head=config.head.name,
        batch=config.batch_size,
        pairs=pairs,
        planned_epochs=steps if epochs is None else epochs,
        cache_epoch_s=pairs.scaled(cache_s),
        recompute_epoch_s=pairs.scaled(step_s + computed_s).stretched(timing.spread),
        encode_s=cost.machine_s.scaled(1.0 if reads_features else 1 - cost.features_share),
        cache_bytes=sum(files, NOTHING),
    )


def recompute_busy(config: TrainConfig, timing: EncodeTiming, *, on_gpu: bool) -> float:
    """Return the busy seconds of computing one pair's inputs."""
    inputs = find_head_class(config.head.name).reads
    needed_by = {"text": {"text", "features"}, "vae": {"latent", "features"}, "unet": {"features"}}
    stages = {stage for stage, some in needed_by.items() if inputs & some}
    stages |= set() if on_gpu else {"decode"}
    return sum(timing.stages[stage].a_row for stage in stages)


def add_heads(heads: Sequence[HeadForecast]) -> HeadForecast:
    """Return the forecast of all heads together: encoded once, then an epoch of each."""
    widest = max(heads, key=lambda head: head.cache_bytes.value)
    return HeadForecast(
        head="all of them",
        batch=0,
        pairs=sum((head.pairs for head in heads), NOTHING),
        planned_epochs=min(head.planned_epochs for head in heads),
        cache_epoch_s=sum((head.cache_epoch_s for head in heads), NOTHING),
        recompute_epoch_s=sum((head.recompute_epoch_s for head in heads), NOTHING),
        encode_s=widest.encode_s,
        cache_bytes=widest.cache_bytes,
    )
