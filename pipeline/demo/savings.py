"""What a store saves: encoding once and reading, against computing the inputs of every pair anew.

The sweeps' trials say how many pairs each kind of head read. How many seconds of a core a pair
takes is measured here both ways: read from the store, and computed from an image in memory as the
paper's code does. The comparison favours computing: its images are already decoded and cropped, and
its UNet stops after the last block that is read. Encoding is charged for every core of the machine.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.bench.recompute import InputEncoder, read_image_batches
from pipeline.evaluate.scoring import one_thread_each
from pipeline.read.order import shuffle_positions
from pipeline.read.source import Source
from pipeline.runs.config import TrainConfig
from pipeline.spec.layer import LayerSpec
from pipeline.sweep.trials import SweepPlan, Trial
from pipeline.train.data import open_readers

BATCH = 16  # pairs that are timed at once
TURNS = 3


@dataclass(frozen=True, slots=True)
class PairCost:
    """Seconds of one core that a pair's inputs take."""

    read_s: float
    recompute_s: float


@dataclass(frozen=True, slots=True)
class Savings:
    """Seconds of a core: what the store cost, and what computing anew would have cost."""

    encode_s: float
    read_s: float
    recompute_s: float
    num_reads: int  # pairs read in training and validation
    num_heads: int

    @property
    def saved_s(self) -> float:
        """Negative where recomputing would have been less."""
        return self.recompute_s - self.read_s - self.encode_s


def measure_savings(plans: Iterable[SweepPlan], *, features: LayerSpec, encode_s: float) -> Savings:
    """Count the pairs that the trials of ``plans`` read, and time a pair of each kind of head.

    The latents layer must have its views' images (``keep_image``). ``encode_s`` is what encoding
    took, in seconds of a core; ``features`` is a layer of the model that encoded.
    """
    reads: Counter[tuple[str, int]] = Counter()
    examples: dict[tuple[str, int], tuple[SweepPlan, Trial]] = {}
    num_heads = 0
    for plan in plans:
        for trial in plan.trials:
            if not trial.is_baselines:
                kind = trial.config.head.name, max(trial.config.head.blocks, default=0)
                reads[kind] += count_reads(trial)
                examples.setdefault(kind, (plan, trial))
                num_heads += 1
    read_s = recompute_s = 0.0
    for kind, (plan, trial) in examples.items():
        source = plan.open_layers(trial)
        cost = time_pair(trial.config, source, source.features or features)
        read_s += reads[kind] * cost.read_s
        recompute_s += reads[kind] * cost.recompute_s
    return Savings(encode_s, read_s, recompute_s, reads.total(), num_heads)


def count_reads(trial: Trial) -> int:
    """Return the pairs that a trial reads in training and one validation, but not in tests."""
    config = trial.config
    return config.num_steps * config.batch_size + trial.num_pairs


def time_pair(config: TrainConfig, source: Source, features: LayerSpec) -> PairCost:
    """Measure the CPU time, of all threads, that a pair's inputs take both ways.

    It is the median of ``TURNS`` batches after one to warm up; those from the store are random
    pairs, as in training. ``features`` is a layer of the LDM that computes; no UNet runs for a head
    that reads no features.
    """
    config = config.model_copy(update={"batch_size": BATCH})
    with one_thread_each():
        reader, _ = open_readers(config, source)
        batch = next(read_image_batches(config, source, reader))
        num = len(batch.prompts)
        encoder = InputEncoder(source.latents, features, config, torch.device("cpu"))
        places = np.arange((1 + TURNS) * num).reshape(-1, num) % len(reader)
        numbers = shuffle_positions(places, num=len(reader), seed=config.seed, epoch=0)
        return PairCost(
            read_s=_time(lambda turn: reader.read(numbers[turn], draws=[0] * num)) / num,
            recompute_s=_time(lambda turn: encoder.encode(batch)) / num,
        )


def _time(act: Callable[[int], object]) -> float:
    """Return the median CPU seconds of the turns but the first, which warms up."""
    seconds = []
    for turn in range(1 + TURNS):
        start_s = time.process_time()
        act(turn)
        seconds.append(time.process_time() - start_s)
    return statistics.median(seconds[1:])
