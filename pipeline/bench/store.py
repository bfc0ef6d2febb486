"""How the store's listings grow with tasks: time, memory and requests.

Data flow: the commit records of many tasks are written, without their arrays -> each step runs in
a process of its own, on a storage that counts requests -> rows with the growth between sizes.
"""

import hashlib
import math
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from pipeline.bench.fresh_process import read_memory_mb, run_fresh
from pipeline.corpus.tasks import Task
from pipeline.encode.missing import CorpusWork
from pipeline.read.reader import PairReader
from pipeline.read.source import open_layers
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, dump_section
from pipeline.spec.layer import LayerSpec, fingerprint
from pipeline.storage.interface import Storage
from pipeline.storage.local import LocalStorage
from pipeline.store.commit import Accounting, Commit, CommittedFile, SourceTar, seal_record
from pipeline.store.layout import GROUP, INDEX, REJECTS, list_arrays
from pipeline.store.records import inventory_folder
from pipeline.store.snapshot import Snapshot, create_snapshot, read_snapshot
from pipeline.store.store import Store
from pipeline.upkeep.inspect import StoreInspector

PAGE_NAMES = 1000  # names in one answer of S3's ListObjectsV2
_TASK, _ATTEMPT = "task-00000000-00000000", "0000-" + "f" * 16  # of the template
_ROWS = {"pairs": 100, "views": 50, "prompts": 80}


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step cost at a size.

    ``growth`` is b where seconds grow as tasks to the power of b, from the size before.
    """

    step: str
    tasks: int
    seconds: float
    cpu_s: float  # of all threads
    growth: float | None
    peak_mb: float  # resident memory of the whole process, imports included
    requests: int


class CountingStorage:
    """A storage that counts the requests which S3 would answer for each call.

    It has no files' times and counts no requests for them: S3 gives them with a listing.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self.num_requests = 0

    def _count(self) -> None:
        with self._lock:
            self.num_requests += 1

    def _count_pages(self, names: Iterator[Any]) -> Iterator[Any]:
        for number, name in enumerate(names):
            if number % PAGE_NAMES == 0 and number:
                self._count()
            yield name

    def find_time(self, path: str) -> float | None:
        """Return None."""

    def list_times(self, folder: str) -> dict[str, float]:
        """Return none."""
        return {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._storage, name)
        if not callable(found) or name == "sync_folders":
            return found

        def call(*arguments: Any) -> Any:
            self._count()
            answer = found(*arguments)
            return self._count_pages(answer) if name.startswith("list_") else answer

        return call


def make_layers() -> tuple[LayerSpec, LayerSpec]:
    """Return the two layers of the default spec; their model has no files."""
    latents = make_layer(LatentsSpec(model="none"), scaling_factor=1.0)
    return latents, make_layer(FeaturesSpec(), latents=latents.fingerprint)


def make_layer(section: LatentsSpec | FeaturesSpec, **more: Any) -> LayerSpec:
    """Return the layer of one section of a spec; its model has no files."""
    source = {"model": "none", "revision": None, "variant": None}
    kind = "latents" if isinstance(section, LatentsSpec) else "features"
    plain = dump_section(section, without=set(source))
    canonical = {"schema_version": 1, "kind": kind, "section": plain, "weights": {}, **more}
    fields = {"kind": kind, "fingerprint": fingerprint(canonical), "canonical": canonical}
    return LayerSpec.model_validate({**fields, "source": source, "tolerance": 0.0})


def list_bench_tasks(num: int) -> list[Task]:
    """Return the tasks of a corpus of ``num`` tars that do not exist."""
    return [Task(_task_id(i), f"file:///corpus/{_task_id(i)}.tar", 1) for i in range(num)]


def _task_id(number: int) -> str:
    return f"task-{number:08d}-{number:08x}"


def write_records(folder: Path, num: int) -> None:
    """Write both layers' specs and ``num`` commit records each, as encode would name them.

    A record is one of 100 pairs with the files of its layer, so about 2-4 KB.
    """
    store = Store(LocalStorage(folder))
    for layer in make_layers():
        store.add_layer(layer)
        template = make_record(layer).model_dump_json(indent=1)
        commits = folder / layer.folder / "commits"
        commits.mkdir()
        for task in list_bench_tasks(num):
            text = template.replace(_TASK, task.id).replace(_ATTEMPT, f"0000-{task.id[-8:]:>016}")
            (commits / f"{task.id}.0000.json").write_bytes(seal_record(text.encode()))


def make_record(layer: LayerSpec) -> Commit:
    """Return the commit record that ``write_records`` writes, with the names of a template."""
    names = [f"{GROUP}/zarr.json"]
    for name, kind in list_arrays(layer).items():
        schema = kind.schema(name, (1,) * (len(kind.dimensions) - 1))
        names += [f"{GROUP}/{name}/zarr.json", f"{GROUP}/{name}/{schema.shard_key(0)}"]
    digest = hashlib.sha256(b"").hexdigest()
    more: dict[str, Any] = {"latents_generation": 0}
    if layer.kind == "latents":
        names += [INDEX, REJECTS]
        url = f"file:///corpus/{_TASK}.tar"
        counts = Accounting(samples=50, stored_samples=50, rejected_samples=0, rejected_members=0)
        source = SourceTar(url=url, num_bytes=1, sha256=digest, head_sha256=digest)
        more = {"source": source, "accounting": counts}
    files = [
        CommittedFile(path=f"data/{_TASK}/{_ATTEMPT}/{name}", num_bytes=10**6, sha256=digest)
        for name in names
    ]
    return Commit(
        layer=layer.folder,
        task=_TASK,
        generation=0,
        attempt=_ATTEMPT,
        rows=_ROWS,
        pairs_sha256=digest,
        files=tuple(files),
        **more,
    )


def _list_missing(store: Store, num: int) -> None:
    latents, features = make_layers()
    assert not CorpusWork(store, latents, features, list_bench_tasks(num)).list_missing().items


def _create_snapshot(store: Store, num: int) -> None:
    made = create_snapshot(store, [layer.folder for layer in store.list_layers()])
    assert [len(records) for records in made.records.values()] == [num, num]


def _open_snapshot(store: Store, num: int) -> Snapshot:
    name = next(iter(store.storage.list_names("snapshots")))
    opened = read_snapshot(store, name.removesuffix(".json"))
    assert [len(records) for records in opened.records.values()] == [num, num]
    return opened


def _inspect(store: Store, num: int) -> None:
    assert [layer.num_tasks for layer in StoreInspector(store).summarise().layers] == [num, num]


def _open_reader(store: Store, num: int) -> None:
    source = open_layers(store, snapshot=_open_snapshot(store, num))
    reader = PairReader(
        source, tasks="*", inputs=frozenset({"latent", "features"}), blocks=FeaturesSpec().blocks
    )
    assert len(reader) == num * _ROWS["pairs"]


NO_TABLE = ", no table"
"""Before a step of this name the table of records is removed, so that it reads every record."""
STEPS: dict[str, Callable[[Store, int], object]] = {
    f"list missing{NO_TABLE}": _list_missing,
    "list missing": _list_missing,
    "create snapshot": _create_snapshot,
    "open snapshot": _open_snapshot,
    f"open reader{NO_TABLE}": _open_reader,
    "open reader": _open_reader,
    f"inspect{NO_TABLE}": _inspect,
    "inspect": _inspect,
}


def run_step(step: str, folder: Path, num: int) -> tuple[float, float, float, int]:
    """Run one step in this process; return seconds, CPU seconds, peak resident MB and requests."""
    counting = CountingStorage(LocalStorage(folder))
    store = Store(cast(Storage, counting))
    start, start_cpu = time.perf_counter(), time.process_time()
    STEPS[step](store, num)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    return seconds, cpu_s, read_memory_mb("VmHWM"), counting.num_requests


def measure_store(
    folder: Path, sizes: Sequence[int], *, run: Callable[..., Any] = run_fresh
) -> list[StepCost]:
    """Measure every step at each size, in stores that stay below ``folder``.

    ``run`` calls a step; the default does it in a fresh process. The files were just written, so
    they are in the page cache.
    """
    rows: list[StepCost] = []
    before: dict[str, StepCost] = {}
    for num in sorted(sizes):
        there = folder / f"store-{num}-{secrets.token_hex(4)}"
        write_records(there, num)
        for step in STEPS:
            if step.endswith(NO_TABLE):
                for layer in make_layers():
                    shutil.rmtree(there / inventory_folder(layer.folder), ignore_errors=True)
            seconds, cpu_s, peak_mb, requests = run(partial(run_step, step, there, num))
            growth = _find_growth(before.get(step), num, seconds)
            before[step] = StepCost(step, num, seconds, cpu_s, growth, peak_mb, requests)
            rows.append(before[step])
    return sorted(rows, key=lambda row: (list(STEPS).index(row.step), row.tasks))


def _find_growth(before: StepCost | None, num: int, seconds: float) -> float | None:
    if before is None or before.tasks == num:
        return None
    return math.log(seconds / before.seconds) / math.log(num / before.tasks)
