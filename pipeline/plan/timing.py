"""What encoding costs on this machine: the real stage over tars of a few samples, timed.

Data flow: samples -> a tar of one sample, to load the models -> the same twice more: what a task
costs however small -> twice some tars of many samples, ``MAX_IN_FLIGHT`` at once: what a row costs,
and how well the stages overlap -> for each stage and each kind of file a line, so much a task and
so much a row.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from models.ldm.tuning import Tuning
from pipeline.base.yaml import SpecError
from pipeline.corpus.tasks import list_tasks
from pipeline.encode.prepare import prepare_encode
from pipeline.plan.estimate import ratio_error
from pipeline.plan.files import count_committed, rows_of_file
from pipeline.plan.forecast import format_seconds
from pipeline.plan.sample import Sample, count_phrases, write_tar
from pipeline.spec.fields import Spec
from pipeline.spec.layer import LayerSpec
from pipeline.stage.encode_stage import MAX_IN_FLIGHT, EncodeStage
from pipeline.stage.work import EncodeConfig, TaskOutcome, WorkItem
from pipeline.store.layout import INDEX

BUDGET_S = 120.0
"""What both passes over many samples may take; a slow device gets fewer samples."""
NUM_PASSES = 2
RANGE_OF_TWO = 1.128  # mean range of two draws in standard deviations: the d2 of control charts
_TABLE_ERROR = 0.5
_UNLIMITED = 1e9  # units that each sampled one stands for: no part of the whole is known
# What a stage's time grows with.
STAGE_ROWS = {
    "fetch": "tar_bytes",
    "decode": "samples",
    "vae": "views",
    "text": "new_prompts",
    "read": "draws",
    "unet": "draws",
    "write": "bytes",
    "commit": "bytes",
}


@dataclass(frozen=True, slots=True)
class Line:
    """A cost: so much a task, so much a row of ``rows``; ``relative`` is the row's half width."""

    rows: str
    a_task: float
    a_row: float
    relative: float = 0.0


@dataclass(frozen=True)
class EncodeTiming:
    """What encoding the sample cost, and what became of it. Rows are of both passes together."""

    stages: Mapping[str, Line]  # busy seconds
    files: Mapping[tuple[str, str], Line]  # (layer's folder, array or file) -> bytes
    rows: Mapping[str, float]
    rejects: Mapping[str, int]
    wall_s: float  # of both passes
    busy_s: Mapping[str, float]  # of both passes, by stage
    num_tasks: int  # of both passes
    num_passes: int
    spread: float  # half width of the wall time over it, from the two passes
    cpu_s: float  # processor time of both passes
    load_s: float  # of the models
    latents: LayerSpec
    features: LayerSpec | None
    store_url: str


@dataclass
class _Pass:
    """One batch of tasks through the stage."""

    outcomes: list[TaskOutcome]
    wall_s: float
    cpu_s: float
    rows: Counter[str] = field(default_factory=Counter)
    files: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def busy_s(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for outcome in self.outcomes:
            total.update(outcome.busy_s or {"unet": outcome.elapsed_s})
        return total


class EncodeTimer:
    """Runs the encode stage over a scratch corpus into a scratch store.

    Args:
        folder: for the scratch tars.
        store_url: of the scratch store.
        num_threads: of torch on the CPU, as an actor would have; None leaves torch's choice.
        num_decoders: processes that decode images, as an actor would have.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        folder: Path,
        store_url: str,
        batch: int,
        num_threads: int | None,
        num_decoders: int,
        tuning: Tuning,
        say: Callable[[str], None],
    ) -> None:
        self._spec = spec
        self._folder = folder
        self._store_url = store_url
        self._options: dict[str, Any] = {"batch": batch, "tuning": tuning}
        self._workers: dict[str, Any] = {"num_threads": num_threads, "num_decoders": num_decoders}
        self._say = say
        # torch.compile and cuDNN choose kernels at the first batch of a shape.
        self._compiles_by_shape = tuning.compile or torch.cuda.is_available()

    def measure(self, samples: Sequence[Sample]) -> EncodeTiming:
        """Encode the samples and return what it cost.

        Raises:
            SpecError, ModelFilesError: the spec or the model is not what it must be.
            RuntimeError: a tar of the sample failed to encode.
            SpecError: nothing of the sample could be stored.
        """
        self._write("warm-0", samples[:1])
        self._say("hashing the model's files")
        config = self._prepare()
        stage = EncodeStage(config)
        try:
            self._say("loading the models")
            load = self._encode(stage, config, ["warm-0"])
            single = min(
                (self._encode_single(stage, config, i, samples) for i in range(2)),
                key=lambda p: p.wall_s,
            )
            num = self._fit_budget(len(samples), single.wall_s)
            most = format_seconds(NUM_PASSES * num * single.wall_s)
            self._say(
                f"encoding {num} of the sample's images, {NUM_PASSES} times: at most about {most}"
            )
            load_s = load.wall_s - single.wall_s
            if self._compiles_by_shape:
                load_s += self._encode_many(stage, config, "warm", samples[:num]).wall_s
            passes = [
                self._encode_many(stage, config, number, samples[:num])
                for number in range(NUM_PASSES)
            ]
            if self._compiles_by_shape:
                load_s -= min(p.wall_s for p in passes)
        finally:
            stage.close()
        if not sum(found.rows["pairs"] for found in passes):
            raise SpecError(
                f"plan: nothing of {num} sampled images could be stored; rejected: "
                f"{dict(_add_rejects(passes))}"
            )
        return _collect(config, single, passes, load_s=max(load_s, 0.0))

    def _prepare(self) -> EncodeConfig:
        pattern = str(self._folder / "warm-0.tar")
        run = prepare_encode(self._spec, [pattern], self._store_url, **self._options)
        return replace(run.config, **self._workers)

    def _fit_budget(self, num: int, single_s: float) -> int:
        affordable = int(BUDGET_S / NUM_PASSES / max(single_s, 1e-3))
        return min(num, max(affordable, MAX_IN_FLIGHT))

    def _encode_single(
        self, stage: EncodeStage, config: EncodeConfig, number: int, samples: Sequence[Sample]
    ) -> _Pass:
        name = f"single-{number}"
        self._write(name, samples[:1])
        return self._encode(stage, config, [name])

    def _encode_many(
        self, stage: EncodeStage, config: EncodeConfig, number: int | str, samples: Sequence[Sample]
    ) -> _Pass:
        names = [f"pass-{number}-{i}" for i in range(min(MAX_IN_FLIGHT, len(samples)))]
        for i, name in enumerate(names):
            self._write(name, samples[i :: len(names)], phrases_end=f" {number}")
        found = self._encode(stage, config, names)
        found.rows["phrases"] = sum(count_phrases(sample) for sample in samples)
        return found

    def _write(self, name: str, samples: Sequence[Sample], *, phrases_end: str = "") -> None:
        # Another end: prompts that the stage has not met, or it would encode none in later passes.
        write_tar(self._folder / f"{name}.tar", samples, phrases_end=phrases_end or f" {name}")

    def _encode(self, stage: EncodeStage, config: EncodeConfig, names: Sequence[str]) -> _Pass:
        tasks = list_tasks([str(self._folder / f"{name}.tar") for name in names])
        cpu_s, start_s = time.process_time(), time.monotonic()
        futures = [stage.submit(WorkItem(task, None, None)) for task in tasks]
        outcomes = [future.result() for future in futures]
        wall_s = time.monotonic() - start_s
        for outcome in outcomes:
            if outcome.status == "failed":
                raise RuntimeError(f"plan: the sample could not be encoded: {outcome.error}")
        found = _Pass(outcomes, wall_s, time.process_time() - cpu_s)
        # The decoder's processes are not this one's: their wall time stands for their CPU time.
        found.cpu_s += found.busy_s["decode"]
        layers = [layer for layer in (config.latents, config.features) if layer is not None]
        stored = count_committed(config.store_url, layers, {task.id for task in tasks})
        found.rows.update(stored.rows)
        found.rows["tar_bytes"] = sum(task.num_bytes for task in tasks)
        found.files.update(stored.files)
        return found


def fit_line(
    rows: str, single: tuple[float, float], many: tuple[float, float], *, num_tasks: int
) -> Line:
    """Return the line through a task of few rows and ``num_tasks`` of many.

    Args:
        rows: their name.
        single: rows and cost of the one task.
        many: rows and cost of the others together.
    """
    (few, small), (most, whole) = single, many
    spread = most - num_tasks * few
    a_row = (whole - num_tasks * small) / spread if spread > 0 else 0.0
    # Neither part of a cost is below 0; noise may say so.
    a_task = min(max(small - max(a_row, 0.0) * few, 0.0), whole / num_tasks)
    return Line(rows, a_task, max(whole - num_tasks * a_task, 0.0) / most if most else 0.0)


def _collect(
    config: EncodeConfig, single: _Pass, passes: Sequence[_Pass], *, load_s: float
) -> EncodeTiming:
    rows, busy_s = _add(p.rows for p in passes), _add(p.busy_s for p in passes)
    num_tasks = sum(len(p.outcomes) for p in passes)
    stages = {}
    for stage, name in STAGE_ROWS.items():
        few = (single.rows[name], single.busy_s[stage])
        stages[stage] = fit_line(name, few, (rows[name], busy_s[stage]), num_tasks=num_tasks)
    walls = [p.wall_s for p in passes]
    return EncodeTiming(
        stages=stages,
        files=_fit_files(config, single, passes),
        rows=rows,
        rejects=_add_rejects(passes),
        wall_s=sum(walls),
        busy_s=busy_s,
        num_tasks=num_tasks,
        num_passes=len(passes),
        spread=2 * (max(walls) - min(walls)) / RANGE_OF_TWO / (sum(walls) / len(walls)),
        cpu_s=sum(p.cpu_s for p in passes),
        load_s=load_s,
        latents=config.latents,
        features=config.features,
        store_url=config.store_url,
    )


def _fit_files(
    config: EncodeConfig, single: _Pass, passes: Sequence[_Pass]
) -> dict[tuple[str, str], Line]:
    layers = {x.folder: x for x in (config.latents, config.features) if x is not None}
    lines = {}
    for key, few in single.files.items():
        folder, file = key
        found = [pair for p in passes for pair in p.files[key]]
        rows = [r for r, _ in found]
        sizes = [b for _, b in found]
        name = rows_of_file(layers[folder], file)
        if name is None:
            lines[key] = Line("", sum(sizes) / len(sizes), 0.0)
            continue
        line = fit_line(name, few[0], (sum(rows), sum(sizes)), num_tasks=len(found))
        # The first pass' tars are random parts of the sample, and later passes have the same
        # images: their scatter is that of compressed rows, none where nothing is compressed.
        first = passes[0].files[key]
        above = [num_bytes - line.a_task for _, num_bytes in first]
        error = ratio_error(above, [r for r, _ in first], weights=[_UNLIMITED] * len(first))
        # A table's columns compress better the longer they are.
        lines[key] = replace(line, relative=_TABLE_ERROR if file == INDEX else error)
    return lines


def _add(counters: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _add_rejects(passes: Sequence[_Pass]) -> dict[str, int]:
    return dict(_add(Counter(o.rejects) for p in passes for o in p.outcomes))
