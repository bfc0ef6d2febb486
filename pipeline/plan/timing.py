"""What encoding costs on this machine: the real stage over tars of a few samples, timed.

Data flow: samples -> a tar of one sample, to load the models -> two more such tars: the cost of a
task, however small -> twice some tars of many samples, ``MAX_IN_FLIGHT`` at once: the cost of a
row, and how well the stages overlap -> for each stage and each kind of file a line: so much a task
and so much a row.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from models.ldm.tuning import Tuning
from pipeline.base.yaml import SpecError
from pipeline.corpus.tasks import list_tasks
from pipeline.encode.prepare import prepare_encode
from pipeline.plan.estimate import ratio_error
from pipeline.plan.files import Committed, rows_of_file
from pipeline.plan.forecast import format_seconds
from pipeline.plan.sample import Sample, count_offered, write_tar
from pipeline.spec.fields import Spec
from pipeline.spec.layer import LayerSpec
from pipeline.stage.encode_stage import MAX_IN_FLIGHT, EncodeStage
from pipeline.stage.work import EncodeConfig, TaskOutcome, WorkItem
from pipeline.store.layout import EMPTY_PROMPT, INDEX
from pipeline.store.store import Store

BUDGET_S = 120.0
"""Time limit of both passes over many samples; a slow device gets fewer samples."""
NUM_PASSES = 2
RANGE_OF_TWO = 1.128  # mean range of two draws in standard deviations: d2 of control charts
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
    """What encoding the sample cost. All sums are over both passes."""

    stages: Mapping[str, Line]  # busy seconds
    files: Mapping[tuple[str, str], Line]  # (layer's folder, array or file) -> bytes
    rows: Mapping[str, float]
    rejects: Mapping[str, int]
    wall_s: float
    busy_s: Mapping[str, float]  # by stage
    num_tasks: int
    spread: float  # half width of the wall time over it, from the two passes
    cpu_s: float
    load_s: float  # time to load the models
    latents: LayerSpec
    features: LayerSpec | None
    store_url: str


@dataclass
class _Pass:
    """Some tasks that went through the stage together."""

    outcomes: list[TaskOutcome]
    wall_s: float
    cpu_s: float
    committed: Committed

    @property
    def rows(self) -> Counter[str]:
        return self.committed.rows

    @property
    def busy_s(self) -> Counter[str]:
        return _add(outcome.busy_s or {"unet": outcome.elapsed_s} for outcome in self.outcomes)


class _Encoder:
    """The encode stage over scratch tars in ``folder``."""

    def __init__(self, config: EncodeConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self.stage = EncodeStage(config)

    def encode(self, name: str, samples: Sequence[Sample]) -> _Pass:
        """Encode all samples, in as many tars as can be in flight at once.

        Their phrases end with ``name``: the stage keeps prompts, and would not encode any twice.
        """
        num = min(MAX_IN_FLIGHT, len(samples))
        for i in range(num):
            path = self._folder / f"{name}-{i}.tar"
            write_tar(path, samples[i::num], phrases_end=f" {name}")
        tasks = list_tasks([str(self._folder / f"{name}-*.tar")])
        cpu_s, start_s = time.process_time(), time.monotonic()
        futures = [self.stage.submit(WorkItem(task, None, None)) for task in tasks]
        outcomes = [future.result() for future in futures]
        wall_s = time.monotonic() - start_s
        for outcome in outcomes:
            if outcome.status == "failed":
                raise RuntimeError(f"plan: the sample could not be encoded: {outcome.error}")
        found = _Pass(outcomes, wall_s, time.process_time() - cpu_s, Committed())
        # The decoder's processes are not this one's: their wall time stands for their CPU time.
        found.cpu_s += found.busy_s["decode"]
        self._add_committed(found.committed, {task.id for task in tasks})
        found.rows["tar_bytes"] = sum(task.num_bytes for task in tasks)
        for members, text, _ in samples:
            num_masks = count_offered(text, members, self._config.latents.latents)["masks"]
            found.rows["offered_masks"] += num_masks
        return found

    def _add_committed(self, found: Committed, tasks: set[str]) -> None:
        store, prompts = Store.open(self._config.store_url), set[str]()
        for layer in (self._config.latents, self._config.features):
            for commit in store.read_commits(layer.folder) if layer is not None else ():
                if layer is not None and commit.task in tasks:
                    found.add(layer, commit)
                    if layer.kind == "latents":
                        index = store.read_index(commit)
                        stored = index.filter(index["text_row"].is_valid())  # not so: text: none
                        prompts.update(stored["prompt"].to_pylist())
        found.rows["new_prompts"] = len(prompts - {EMPTY_PROMPT})


def time_encoding(
    spec: Spec,
    samples: Sequence[Sample],
    *,
    folder: Path,
    store_url: str,
    batch: int,
    num_threads: int | None,
    num_decoders: int,
    tuning: Tuning,
    say: Callable[[str], None],
) -> EncodeTiming:
    """Encode some samples into a scratch store and return what it cost.

    ``folder`` is for scratch tars. ``num_threads`` of torch on the CPU (None leaves torch's choice)
    and ``num_decoders`` are those of an actor. ``say`` is called with what starts now.

    Raises:
        SpecError, ModelFilesError: the spec or the model is not valid, or nothing of the sample
            could be stored.
        RuntimeError: a tar of the sample failed to encode.
    """
    say("hashing the model's files")
    one = [next((x for x in samples if x.members.ignore), samples[0])]  # so it has every array
    write_tar(folder / "first.tar", one)
    run = prepare_encode(spec, [str(folder / "first.tar")], store_url, batch=batch, tuning=tuning)
    config = replace(run.config, num_threads=num_threads, num_decoders=num_decoders)
    # torch.compile and cuDNN choose kernels at the first batch of a shape.
    compiles_by_shape = tuning.compile or torch.cuda.is_available()
    encoder = _Encoder(config, folder)
    try:
        say("loading the models")
        load_s = encoder.encode("load", one).wall_s
        singles = [encoder.encode(f"single-{i}", one) for i in range(2)]
        single = min(singles, key=lambda found: found.wall_s)
        load_s -= single.wall_s
        affordable = max(int(BUDGET_S / NUM_PASSES / max(single.wall_s, 1e-3)), MAX_IN_FLIGHT)
        some = samples[:affordable]
        most = format_seconds(NUM_PASSES * len(some) * single.wall_s)
        say(
            f"encoding {len(some)} of the sample's images, {NUM_PASSES} times: at most about {most}"
        )
        if compiles_by_shape:
            load_s += encoder.encode("warm", some).wall_s
        passes = [encoder.encode(f"pass-{number}", some) for number in range(NUM_PASSES)]
        if compiles_by_shape:
            load_s -= min(found.wall_s for found in passes)
    finally:
        encoder.stage.close()
    timing = _collect(config, single, passes, load_s=max(load_s, 0.0))
    if not timing.rows["pairs"]:
        raise SpecError(
            f"plan: nothing of {len(some)} sampled images could be stored; rejected: "
            f"{dict(timing.rejects)}"
        )
    return timing


def fit_line(
    rows: str, single: tuple[float, float], many: tuple[float, float], *, num_tasks: int
) -> Line:
    """Return the line through one task of few rows and ``num_tasks`` tasks of many.

    ``single`` and ``many`` are rows, by the name ``rows``, and cost of the one and of the others.
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
        rejects=_add(outcome.rejects for p in passes for outcome in p.outcomes),
        wall_s=sum(walls),
        busy_s=busy_s,
        num_tasks=num_tasks,
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
    for key in {key: None for p in passes for key in p.committed.files}:
        folder, file = key
        few = single.committed.files.get(key, [(0, 0)])  # its sample was rejected
        found = [pair for p in passes for pair in p.committed.files[key]]
        num_rows, size = (sum(column) for column in zip(*found, strict=True))
        name = rows_of_file(layers[folder], file)
        if name is None or not num_rows:
            lines[key] = Line("", size / len(found), 0.0)
            continue
        line = fit_line(name, few[0], (num_rows, size), num_tasks=len(found))
        # The first pass' tars are random parts of the sample, and later passes have the same
        # images: their scatter is that of compressed rows, none where nothing is compressed.
        first = passes[0].committed.files[key]
        above = [num_bytes - line.a_task for _, num_bytes in first]
        error = ratio_error(above, [r for r, _ in first], weights=[_UNLIMITED] * len(first))
        # A table's columns compress better the longer they are.
        lines[key] = replace(line, relative=_TABLE_ERROR if file == INDEX else error)
    return lines


def _add(counts: Iterable[Mapping[str, float]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total
