"""Device hours and wall time of encoding a corpus with some actors.

On a GPU an actor is as fast as its slowest resource (device, decoders, writers, ...), for they work
at the same time. On a CPU all share the cores, so their times add up. How well they overlap is
measured: the wall time of the timed passes over what this model says of them.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.encode.totals import RESOURCE_THREADS, RESOURCES
from pipeline.plan.counts import CorpusCounts
from pipeline.plan.estimate import NOTHING, Estimate
from pipeline.plan.timing import NUM_PASSES, EncodeTiming

MAX_SCHEDULED = 100_000  # tasks that are scheduled one by one
_THREADS = {RESOURCES[name]: num for name, num in RESOURCE_THREADS.items()}
_FEATURES = ("read", "unet")


@dataclass(frozen=True, slots=True)
class Machines:
    """What encodes: ``num_actors``, on GPUs, or together on ``num_cores`` of one machine."""

    on_gpu: bool
    num_actors: int
    num_cores: int
    start_s: float  # of an actor's process, without the models
    num_gpus: float = 1.0  # of an actor; below 1 where several share one
    num_threads: int | None = None  # of an actor's torch; None leaves torch's choice
    num_decoders: int = 1  # of an actor

    @property
    def device(self) -> torch.device:
        """The device of an actor."""
        return torch.device("cuda" if self.on_gpu else "cpu")


@dataclass(frozen=True)
class EncodeCost:
    """What an encode run takes, and what that follows from."""

    counts: CorpusCounts
    timing: EncodeTiming
    machines: Machines
    busy_s: dict[str, Estimate]  # by stage
    slowest: str  # the stages that set the pace
    start_s: float  # of an actor: its process and the models
    steady_s: Estimate  # of all actors together, without their starts
    wall_s: Estimate  # from the start of the first actor
    machine_s: Estimate  # to pay: GPU seconds with starts; on a CPU the machine's seconds
    cpu_s: Estimate  # of all actors together, without their starts
    machine_s_a_busy_s: float
    features_share: float  # of the cost, what the features layer adds


def cost_encoding(counts: CorpusCounts, timing: EncodeTiming, machines: Machines) -> EncodeCost:
    """Return what encoding a corpus takes."""
    num = counts.num_tasks
    fixed = {stage: line.a_task * num for stage, line in timing.stages.items()}
    grown = {
        stage: counts.rows.get(line.rows, NOTHING).scaled(line.a_row)
        for stage, line in timing.stages.items()
    }
    busy = {stage: grown[stage] + Estimate.exact(f) for stage, f in fixed.items()}
    busy_s = {stage: found.value for stage, found in busy.items()}
    slowest = choose_bottleneck(busy_s, on_gpu=machines.on_gpu)
    overlap = measure_overlap(timing, on_gpu=machines.on_gpu)
    threads = _THREADS.get(slowest, 1)
    work = sum((busy[stage] for stage in slowest), NOTHING)
    steady = work.scaled(overlap / threads).stretched(timing.spread)
    fixed_s = overlap / threads * sum(fixed[stage] for stage in slowest) / num
    shares = counts.task_bytes / counts.task_bytes.sum()
    task_s = fixed_s + (steady.value - fixed_s * num) * shares
    wall_s = schedule(task_s, machines.num_actors)
    cpu = steady.scaled(timing.cpu_s / timing.wall_s)
    device_s = overlap * sum(busy_s[stage] for stage in RESOURCES["device"])
    if machines.on_gpu:  # actors that share a GPU take turns at it
        wall_s = max(wall_s, device_s / (machines.num_actors * machines.num_gpus))
    else:
        wall_s = max(wall_s, cpu.value / machines.num_cores)
    start_s = machines.start_s + timing.load_s
    wall = steady.scaled(wall_s / steady.value) + Estimate.exact(start_s)
    starts = Estimate.exact(start_s * machines.num_actors * machines.num_gpus)
    held = steady.scaled(max(machines.num_gpus, device_s / steady.value))
    paid = held + starts if machines.on_gpu else wall
    return EncodeCost(
        counts=counts,
        timing=timing,
        machines=machines,
        busy_s=busy,
        slowest=" + ".join(slowest) if machines.on_gpu else "the cores, shared by all stages",
        start_s=start_s,
        steady_s=steady,
        wall_s=wall,
        machine_s=paid,
        cpu_s=cpu,
        machine_s_a_busy_s=1.0 if machines.on_gpu else wall_s / max(sum(busy_s.values()), 1e-9),
        features_share=_share_of_features(busy_s, counts, timing),
    )


def choose_bottleneck(busy_s: Mapping[str, float], *, on_gpu: bool) -> tuple[str, ...]:
    """Return the stages that set the pace: on a GPU the slowest resource's, on a CPU all."""
    if not on_gpu:
        return tuple(busy_s)
    return max(
        RESOURCES.values(), key=lambda names: sum(busy_s[s] for s in names) / _THREADS.get(names, 1)
    )


def measure_overlap(timing: EncodeTiming, *, on_gpu: bool) -> float:
    """Return the wall time of the timed passes over what their stages' times say it is.

    On a GPU the first fetch and the last commit of a pass are subtracted: nothing overlaps them.
    """
    slowest = choose_bottleneck(timing.busy_s, on_gpu=on_gpu)
    modelled = sum(timing.busy_s[stage] for stage in slowest) / _THREADS.get(slowest, 1)
    wall_s = timing.wall_s
    if on_gpu:
        ends_s = timing.busy_s["fetch"] + timing.busy_s["commit"]
        wall_s = max(wall_s - NUM_PASSES * ends_s / timing.num_tasks, modelled)
    return wall_s / max(modelled, 1e-9)


def schedule(task_s: np.ndarray, num_workers: int) -> float:
    """Return when the last worker ends, where each starts the next task as soon as it is free."""
    num_workers = min(num_workers, len(task_s))
    if len(task_s) > MAX_SCHEDULED:  # the last task ends half a task late on average
        return float(task_s.sum() / num_workers + task_s.max() / 2)
    free_s = [0.0] * num_workers
    for seconds in task_s:
        heapq.heappush(free_s, heapq.heappop(free_s) + float(seconds))
    return max(free_s)


def _share_of_features(
    busy_s: Mapping[str, float], counts: CorpusCounts, timing: EncodeTiming
) -> float:
    """Return the share of the stages' time that the features layer adds."""
    if timing.features is None:
        return 0.0
    folder = timing.features.folder
    of_bytes = sum(f.value for key, f in counts.files.items() if key[0] == folder)
    share = of_bytes / max(counts.rows["bytes"].value, 1.0)
    ours = sum(busy_s[stage] for stage in _FEATURES) + share * (busy_s["write"] + busy_s["commit"])
    return ours / max(sum(busy_s.values()), 1e-9)
