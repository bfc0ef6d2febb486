"""What encoding a corpus will take: device hours, wall time at some actors, dollars.

On a GPU a stage runs at the pace of its slowest lane, the others beside it; on a CPU all lanes
share the cores, so that their times add up. How well lanes overlap is what the timed passes showed:
their wall time over the model's.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.encode.totals import RESOURCE_THREADS, RESOURCES
from pipeline.plan.counts import CorpusCounts
from pipeline.plan.estimate import NOTHING, Estimate
from pipeline.plan.timing import EncodeTiming

MAX_SCHEDULED = 100_000  # tasks whose order is played through
_THREADS = {RESOURCES[name]: num for name, num in RESOURCE_THREADS.items()}
_FEATURES = ("read", "unet")


@dataclass(frozen=True, slots=True)
class Machines:
    """What encodes: ``num_actors``, on GPUs, or sharing ``num_cores`` of one machine."""

    on_gpu: bool
    num_actors: int
    num_cores: int
    start_s: float  # of an actor's process, without the models
    num_gpus: float = 1.0  # of an actor; a part of one where several share it
    num_threads: int | None = None  # of an actor's torch; None leaves torch's choice
    num_decoders: int = 1  # of an actor


@dataclass(frozen=True)
class EncodeCost:
    """What an encode run takes."""

    busy_s: dict[str, Estimate]  # by stage
    slowest: str  # the lane that sets the pace
    start_s: float  # of an actor: its process and the models
    steady_s: Estimate  # of all actors together, without their start: device seconds
    wall_s: Estimate  # from the first actor's start on
    machine_s: Estimate  # what is paid: GPU seconds with starts; on a CPU, the machine's seconds
    cpu_s: Estimate  # processor seconds of all actors together, without their start
    machine_s_a_busy_s: float
    features_share: float  # of the cost, that only the features layer causes


def cost_encoding(counts: CorpusCounts, timing: EncodeTiming, machines: Machines) -> EncodeCost:
    """Return what encoding a corpus takes."""
    num = counts.num_tasks
    fixed = {stage: line.a_task * num for stage, line in timing.stages.items()}
    grown = {
        stage: counts.rows.get(line.rows, NOTHING).scaled(line.a_row)
        for stage, line in timing.stages.items()
    }
    busy = {stage: grown[stage] + Estimate(f, f, f) for stage, f in fixed.items()}
    lane = choose_lane(
        {stage: found.value for stage, found in busy.items()}, on_gpu=machines.on_gpu
    )
    overlap = measure_overlap(timing, on_gpu=machines.on_gpu)
    threads = _THREADS.get(lane, 1)
    in_lane = sum((busy[stage] for stage in lane), NOTHING)
    steady = in_lane.scaled(overlap / threads).stretched(timing.spread)
    fixed_s = overlap / threads * sum(fixed[stage] for stage in lane) / num
    shares = counts.task_bytes / counts.task_bytes.sum()
    task_s = fixed_s + (steady.value - fixed_s * num) * shares
    wall_s = schedule(task_s, machines.num_actors)
    cpu = steady.scaled(timing.cpu_s / timing.wall_s)
    device_s = overlap * sum(busy[stage].value for stage in RESOURCES["device"])
    if machines.on_gpu:  # actors that share a GPU take turns at it
        wall_s = max(wall_s, device_s / (machines.num_actors * machines.num_gpus))
    else:
        wall_s = max(wall_s, cpu.value / machines.num_cores)
    start_s = machines.start_s + timing.load_s
    wall = steady.scaled(wall_s / steady.value) + Estimate(start_s, start_s, start_s)
    starts_s = start_s * machines.num_actors * machines.num_gpus
    held = steady.scaled(max(machines.num_gpus, device_s / steady.value))
    paid = held + Estimate(starts_s, starts_s, starts_s) if machines.on_gpu else wall
    all_busy = sum(found.value for found in busy.values())
    return EncodeCost(
        busy_s=busy,
        slowest=" + ".join(lane) if machines.on_gpu else "the cores, shared by all stages",
        start_s=start_s,
        steady_s=steady,
        wall_s=wall,
        machine_s=paid,
        cpu_s=cpu,
        machine_s_a_busy_s=1.0 if machines.on_gpu else wall_s / max(all_busy, 1e-9),
        features_share=_share_of_features(busy, counts, timing),
    )


def choose_lane(busy_s: Mapping[str, float], *, on_gpu: bool) -> tuple[str, ...]:
    """Return the stages that set the pace: on a GPU the slowest lane's, on a CPU all."""
    if not on_gpu:
        return tuple(busy_s)
    return max(
        RESOURCES.values(), key=lambda lane: sum(busy_s[s] for s in lane) / _THREADS.get(lane, 1)
    )


def measure_overlap(timing: EncodeTiming, *, on_gpu: bool) -> float:
    """Return the timed passes' wall time over what the lanes' times say it is.

    On a GPU the first fetch and the last commit of a pass, which nothing overlaps, are taken off.
    """
    lane = choose_lane(timing.busy_s, on_gpu=on_gpu)
    modelled = sum(timing.busy_s[stage] for stage in lane) / _THREADS.get(lane, 1)
    wall_s = timing.wall_s
    if on_gpu:
        ends_s = timing.busy_s["fetch"] + timing.busy_s["commit"]
        wall_s = max(wall_s - timing.num_passes * ends_s / timing.num_tasks, modelled)
    return wall_s / max(modelled, 1e-9)


def schedule(task_s: np.ndarray, num_workers: int) -> float:
    """Return when the last of some workers is done, each taking the next task once it is free."""
    num_workers = min(num_workers, len(task_s))
    if len(task_s) > MAX_SCHEDULED:  # the last task ends half of one late on average
        return float(task_s.sum() / num_workers + task_s.max() / 2)
    free_s = [0.0] * num_workers
    for seconds in task_s:
        heapq.heappush(free_s, heapq.heappop(free_s) + float(seconds))
    return max(free_s)


def _share_of_features(
    busy: Mapping[str, Estimate], counts: CorpusCounts, timing: EncodeTiming
) -> float:
    """The share of the stages' time that there would not be without the features layer."""
    if timing.features is None:
        return 0.0
    folder = timing.features.folder
    of_bytes = sum(f.value for key, f in counts.files.items() if key[0] == folder)
    share = of_bytes / max(counts.rows["bytes"].value, 1.0)
    ours = sum(busy[stage].value for stage in _FEATURES)
    ours += share * sum(busy[stage].value for stage in ("write", "commit"))
    return ours / max(sum(found.value for found in busy.values()), 1e-9)
