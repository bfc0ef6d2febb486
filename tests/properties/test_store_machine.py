"""A store under crashes, kills, races, damage, repair and gc, beside a plain dict.

Tasks are tiny arrays written by real attempts. A crash is an error at a failpoint, after which the
attempt cleans up; a kill is SIGKILL in a forked child, after which nobody does; a slow writer is an
attempt left between its last row and its commit while everything else goes on.
"""

import os
import shutil
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier, Thread
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
import zarr
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pipeline.base.failpoints import FAILPOINTS, set_failpoints
from pipeline.bench.store import make_layer
from pipeline.corpus.tasks import Task
from pipeline.spec.fields import FeaturesSpec, LatentsSpec
from pipeline.stage.work import TaskOutcome
from pipeline.store import array_writer as shards
from pipeline.store.attempt import Attempt
from pipeline.store.commit import (
    Accounting,
    Commit,
    DamagedStoreError,
    RecordName,
    SourceTar,
    attempt_generation,
    list_records,
    read_commit,
)
from pipeline.store.layout import (
    GROUP,
    INDEX,
    INDEX_SCHEMA,
    REJECTS,
    REJECTS_SCHEMA,
    digest_pairs,
    list_arrays,
)
from pipeline.store.snapshot import create_snapshot, read_snapshot
from pipeline.store.store import Store
from pipeline.upkeep.gc import list_orphans, remove_orphans
from pipeline.upkeep.verify import verify_store
from tests.support.missing import list_missing

pytestmark = pytest.mark.thorough

LATENTS = make_layer(LatentsSpec(model="none", size=64), scaling_factor=1.0)
FEATURES = make_layer(FeaturesSpec(blocks=(6,), timesteps=(300, 400)), latents=LATENTS.fingerprint)
SECOND = make_layer(
    FeaturesSpec(blocks=(7,), timesteps=(1,), storage="int8"), latents=LATENTS.fingerprint
)
ROW_SHAPES = {
    "latent_mean": (4, 1, 1),
    "latent_logvar": (4, 1, 1),
    "text": (1, 2),
    "mask": (2, 2),
    "timestep": (2,),
    "block06": (2, 2, 1, 2),
    "block07": (1, 3, 1, 2),
    "block07_scale": (1, 3),
}
SHARD_BYTES = 32  # two rows of block06 a shard
TASKS = [Task(f"task-{i}", f"file:///corpus/task-{i}.tar", 1) for i in range(6)]
WRITER_STEPS = [step for step in FAILPOINTS if not step.startswith("gc.")]
COMMITTED_STEPS = ("record.created", "commit.acknowledged")  # the record has its name by then

tasks = st.sampled_from(TASKS)
numbers = st.integers(0, 10**6)


def make_index(task):
    rows = TASKS.index(task) % 3 + 1
    values = {
        name: [0] * rows if pa.types.is_integer(kind) else [0.5] * rows
        for name, kind in zip(INDEX_SCHEMA.names, INDEX_SCHEMA.types, strict=True)
    }
    values |= {name: ["x"] * rows for name in ("phrase", "prompt", "image_sha256")}
    values |= {"key": [f"{task.id}/{row}" for row in range(rows)]}
    values |= {name: [None] * rows for name in ("color_profile", "ignore_row")}
    values |= {name: [False] * rows for name in ("flipped", "negative", "prompt_cut")}
    values |= {name: list(range(rows)) for name in ("latent_row", "mask_row")}
    values |= {"text_row": [0] * rows}
    return pa.table(values, schema=INDEX_SCHEMA)


INDEXES = {task.id: make_index(task) for task in TASKS}


def make_values(layer, task, salt):
    """The arrays of a task; two writers' differ by ``salt``, so that it shows whose are read."""
    generator = np.random.default_rng([salt, TASKS.index(task)])
    num = INDEXES[task.id].num_rows
    values = {}
    for name, kind in list_arrays(layer).items():
        shape = (num, *ROW_SHAPES[name])
        if name == "timestep":
            shape = (num, layer.features.num_draws)
        values[name] = generator.integers(0, 100, shape).astype(kind.dtype)
    return values


def open_attempt(store, layer, task, generation, values):
    """An attempt that has every row, and is not committed."""
    attempt = Attempt(store.storage, layer, task.id, generation=generation)
    try:
        arrays = attempt.open_arrays({name: array.shape[1:] for name, array in values.items()})
        for name, array in values.items():
            arrays[name].append_rows(array)
        if layer.kind == "latents":
            attempt.write_table(INDEX, INDEXES[task.id])
            attempt.write_table(REJECTS, pa.Table.from_pylist([], schema=REJECTS_SCHEMA))
    except BaseException as error:
        attempt.__exit__(type(error), error, error.__traceback__)
        raise
    return attempt


def commit_attempt(attempt, task):
    index = INDEXES[task.id]
    num = index.num_rows
    latents = attempt.layer.kind == "latents"
    source = SourceTar(url=task.url, num_bytes=1, sha256="0" * 64, head_sha256="0" * 64)
    account = Accounting(samples=num, stored_samples=num, rejected_samples=0, rejected_members=0)
    with attempt:
        return attempt.commit(
            rows={"pairs": num, "views": num, "prompts": num},
            pairs_sha256=digest_pairs(index),
            latents_generation=None if latents else 0,
            source=source if latents else None,
            accounting=account if latents else None,
            provenance={},
        )


def write_task(store, layer, task, generation, values):
    return commit_attempt(open_attempt(store, layer, task, generation, values), task)


@dataclass
class Held:
    """A commit as the model knows it: its record, its values, its files as they were left."""

    commit: Commit
    values: dict[str, np.ndarray]
    files: dict[str, tuple[int, int, int]]
    damaged: set[str] = field(default_factory=set)


@dataclass
class Slow:
    """A writer that has yet to commit."""

    attempt: Attempt
    task: Task
    values: dict[str, np.ndarray]


class StoreMachine(RuleBasedStateMachine):
    """``held`` is the model: (layer, task, generation) -> what is committed there."""

    num_steps = num_children = 0

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="ldznet-machine-"))
        self.patch = patch.object(shards, "SHARD_BYTES", SHARD_BYTES)
        self.patch.start()
        self.store = Store.open(str(self.folder / "store"))
        self.held = {}
        self.layers = [LATENTS, FEATURES]
        self.snapshots = {}
        self.slow = []
        self.salt = 0
        self.turn = 0

    @initialize()
    def add_layers(self):
        for layer in self.layers:
            self.store.add_layer(layer)

    def teardown(self):
        set_failpoints("")
        try:
            self.read_everything()
        finally:
            for slow in self.slow:
                slow.attempt.__exit__()
            self.patch.stop()
            shutil.rmtree(self.folder)

    # The model.

    def newest(self, layer, task):
        """The generation that stands in the model, None without one."""
        found = [g for folder, name, g in self.held if (folder, name) == (layer.folder, task.id)]
        return max(found, default=None)

    def is_damaged(self, layer, task):
        generation = self.newest(layer, task)
        return generation is not None and (
            bool(self.held[layer.folder, task.id, generation].damaged)
            or (layer is not LATENTS and self.newest(LATENTS, task) is None)
        )

    def next_values(self, layer, task):
        self.salt += 1
        return make_values(layer, task, self.salt)

    def free_generation(self, layer, task):
        """The generation that a run would write: the first, or the next after a damaged one."""
        generation = self.newest(layer, task)
        if generation is None:
            return 0
        return generation + 1 if self.is_damaged(layer, task) else None

    def add(self, layer, task, generation, values):
        """Take a commit into the model, as the store has it by now."""
        commit = read_commit(self.store.storage, layer.folder, RecordName(task.id, generation))
        key = (layer.folder, task.id, generation)
        assert key not in self.held, f"{key} was committed twice"
        paths = [commit.name, *(f"{layer.folder}/{file.path}" for file in commit.files)]
        self.held[key] = Held(commit, values, {path: self.stat(path) for path in paths})

    def stat(self, path):
        found = self.store.storage.local_path(path).stat()
        return found.st_ino, found.st_mtime_ns, found.st_size

    # Writers.

    @rule(task=tasks)
    def encode(self, task):
        """What a run does: list, then write what is missing."""
        self.encode_missing([task], damage=())

    def encode_missing(self, chosen, damage):
        for features in self.layers[1:]:
            for item in list_missing(self.store, LATENTS, features, chosen, damage=damage):
                if isinstance(item, TaskOutcome):
                    self.check_failed(item)
                    continue
                if item.latents is None:
                    self.write(LATENTS, item.task, item.next_latents)
                if item.features is None:
                    self.write(features, item.task, item.next_features)

    def check_failed(self, outcome):
        """A task fails before it is tried where its record is damaged."""
        task = next(task for task in TASKS if task.id == outcome.task)
        held = self.held[LATENTS.folder, task.id, self.newest(LATENTS, task)]
        assert held.commit.name in held.damaged, outcome.error

    def write(self, layer, task, generation):
        expected = (self.newest(layer, task) if self.newest(layer, task) is not None else -1) + 1
        assert generation == expected, f"{layer.folder} {task.id}"
        values = self.next_values(layer, task)
        assert write_task(self.store, layer, task, generation, values)[1] == "won"
        self.add(layer, task, generation, values)

    def list_writable(self):
        """Every (layer, task, generation) that a run would write now."""
        free = [(layer, task) for layer in self.layers for task in TASKS]
        found = [(layer, task, self.free_generation(layer, task)) for layer, task in free]
        return [entry for entry in found if entry[2] is not None]

    def choose_writable(self, which):
        writable = self.list_writable()
        return writable[which % len(writable)]

    @precondition(list_writable)
    @rule(
        which=numbers,
        step=st.sampled_from(WRITER_STEPS),
        at=st.integers(1, 3),
        action=st.sampled_from(["raise", "full", "kill"]),
    )
    def crash(self, which, step, at, action):
        """A writer ends at a failpoint, or gets through where it does not pass it so often."""
        layer, task, generation = self.choose_writable(which)
        values = self.next_values(layer, task)
        text = f"{step}@{at}={action}"
        if action == "kill":
            through = self.write_in_child(text, layer, task, generation, values)
        else:
            through = self.write_with(text, layer, task, generation, values)
        if through or (at == 1 and step in COMMITTED_STEPS):
            self.add(layer, task, generation, values)

    def write_with(self, failpoints, *arguments):
        set_failpoints(failpoints)
        try:
            write_task(self.store, *arguments)
        except OSError:
            return False
        finally:
            set_failpoints("")
        return True

    def write_in_child(self, failpoints, *arguments):
        type(self).num_children += 1
        child = os.fork()
        if child == 0:
            status = 1
            try:
                set_failpoints(failpoints)
                write_task(self.store, *arguments)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or os.waitstatus_to_exitcode(status) == 0
        return not killed

    @precondition(list_writable)
    @rule(which=numbers)
    def race(self, which):
        """Two writers of one generation: one wins, the store holds its values."""
        layer, task, generation = self.choose_writable(which)
        all_values = [self.next_values(layer, task) for _ in range(2)]
        told = [None, None]
        start = Barrier(2)

        def run(number):
            attempt = open_attempt(self.store, layer, task, generation, all_values[number])
            start.wait()
            told[number] = commit_attempt(attempt, task)[1]

        threads = [Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(told) == ["lost", "won"]
        self.add(layer, task, generation, all_values[told.index("won")])

    @precondition(lambda self: len(self.slow) < 3 and self.list_writable())
    @rule(which=numbers)
    def start_slowly(self, which):
        layer, task, generation = self.choose_writable(which)
        values = self.next_values(layer, task)
        attempt = open_attempt(self.store, layer, task, generation, values)
        self.slow.append(Slow(attempt, task, values))

    @precondition(lambda self: self.slow)
    @rule()
    def finish_slowly(self):
        """It wins where nobody came before it; else it loses, or finds its files removed by gc."""
        slow = self.slow.pop(0)
        layer, generation = slow.attempt.layer, slow.attempt.generation
        there = (layer.folder, slow.task.id, generation) in self.held
        try:
            outcome = commit_attempt(slow.attempt, slow.task)[1]
        except (OSError, DamagedStoreError):
            assert there
            return
        assert outcome == ("lost" if there else "won")
        if not there:
            self.add(layer, slow.task, generation, slow.values)

    @precondition(lambda self: SECOND not in self.layers)
    @rule()
    def add_second_layer(self):
        self.store.add_layer(SECOND)
        self.layers.append(SECOND)

    # Damage and repair.

    def list_sound(self):
        """Every file of the newest commits that is as it was written, in a fixed order."""
        found = []
        for (folder, name, generation), held in sorted(self.held.items()):
            if any(key[:2] == (folder, name) and key[2] > generation for key in self.held):
                continue
            for path in sorted(held.files, key=lambda p: p.replace(held.commit.attempt, "")):
                if path not in held.damaged:
                    found.append((held, path))
        return found

    @precondition(lambda self: self.list_sound())
    @rule(
        which=numbers,
        how=st.sampled_from(["flip", "cut", "delete"]),
        at=numbers,
    )
    def corrupt(self, which, how, at):
        sound = self.list_sound()
        held, path = sound[which % len(sound)]
        file = self.store.storage.local_path(path)
        data = file.read_bytes()
        at %= len(data)
        record = path == held.commit.name
        if how == "delete":
            file.unlink()
        elif how == "cut" or record:  # a record has no checksum: only what is no record any more
            file.write_bytes(data[: min(at, len(data) - 2)])
        else:
            file.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        if record and how == "delete":  # then nothing says that it ever was
            del self.held[held.commit.layer, held.commit.task, held.commit.generation]
        else:
            held.damaged.add(path)

    def find_damage(self):
        if not any(True for _ in self.store.list_layers()):
            return []
        return [d for check in verify_store(self.store, num_threads=2) for d in check.damage]

    @rule()
    def verify(self):
        found = {(d.layer, d.task) for d in self.find_damage()}
        expected = {
            (layer.folder, task.id)
            for layer in self.layers
            for task in TASKS
            if self.is_damaged(layer, task)
        }
        assert found == expected

    @rule()
    def repair(self):
        """A run with the report of ``verify`` leaves nothing damaged; a second has no work."""
        damage = self.find_damage()
        self.encode_missing(TASKS, damage)
        for features in self.layers[1:]:
            assert not list_missing(self.store, LATENTS, features, TASKS, damage=damage)
        assert not self.find_damage()
        assert not any(self.is_damaged(layer, task) for layer in self.layers for task in TASKS)

    @rule()
    def list_what_is_missing(self):
        for features in self.layers[1:]:
            missing = list_missing(self.store, LATENTS, features, TASKS)
            failed = [item for item in missing if isinstance(item, TaskOutcome)]
            for outcome in failed:
                self.check_failed(outcome)
            set_aside = {outcome.task for outcome in failed}
            items = [item for item in missing if not isinstance(item, TaskOutcome)]
            found = {item.task.id: (item.latents, item.features) for item in items}
            expected = {
                task.id: (self.newest(LATENTS, task), self.newest(features, task))
                for task in TASKS
                if None in (self.newest(LATENTS, task), self.newest(features, task))
                and task.id not in set_aside
            }
            assert found == expected

    # What is left behind, and what is pinned.

    def list_attempts(self):
        for layer in self.layers:
            for folder in (self.store.storage.root / layer.folder / "data").glob("*/*"):
                yield layer.folder, folder.parent.name, folder.name

    @rule(step=st.sampled_from(["", "gc.listed=raise", "gc.removed=raise", "gc.listed@2=raise"]))
    def collect(self, step):
        """All losers go, and no file that is committed or may become so."""
        live = {(slow.attempt.layer.folder, slow.task.id, slow.attempt.name) for slow in self.slow}
        before = set(self.list_attempts())
        set_failpoints(step)
        try:
            list(remove_orphans(self.store, list_orphans(self.store)))
        except OSError:
            assert step
        else:
            for folder, task, attempt in self.list_attempts():
                held = self.held.get((folder, task, attempt_generation(attempt)))
                if held is not None and held.commit.name not in held.damaged:
                    assert held.commit.attempt == attempt, f"{attempt} is left"
        finally:
            set_failpoints("")
        gone = before - set(self.list_attempts())
        for folder, task, attempt in gone:
            held = self.held[folder, task, attempt_generation(attempt)]
            assert held.commit.attempt != attempt
        assert all(
            (folder, task, attempt_generation(attempt)) in self.held
            for folder, task, attempt in gone & live
        )

    @rule()
    def pin(self):
        made = create_snapshot(self.store, [layer.folder for layer in self.layers])
        self.snapshots[made.digest] = {
            layer.folder: [
                (task.id, generation)
                for task in TASKS
                if (generation := self.newest(layer, task)) is not None
                and self.newest(LATENTS, task) is not None  # nothing reads features without latents
            ]
            for layer in self.layers
        }

    @precondition(lambda self: self.snapshots)
    @rule(which=numbers)
    def read_pinned(self, which):
        digest = sorted(self.snapshots, key=lambda d: str(self.snapshots[d]))[
            which % len(self.snapshots)
        ]
        found = read_snapshot(self.store, digest)
        plain = {f: [(r.task, r.generation) for r in rs] for f, rs in found.records.items()}
        assert plain == self.snapshots[digest]
        for folder, records in plain.items():
            for task, generation in records:
                self.read(folder, task, generation)

    # Reading.

    def read(self, folder, task, generation):
        """The model's values, or an error where the model says that something is damaged."""
        held = self.held.get((folder, task, generation))
        layer = next(layer for layer in self.layers if layer.folder == folder)
        try:
            commit = read_commit(self.store.storage, folder, RecordName(task, generation))
        except DamagedStoreError:
            assert held is None or held.commit.name in held.damaged
            return
        assert held is not None
        assert commit == held.commit
        assert commit.accounting is None or commit.accounting.balanced
        for name, values in held.values.items():
            try:
                array = self.store.open_array(layer, commit, name)
                rows = [array.read_rows([row])[0] for row in range(array.num_rows)]
            except DamagedStoreError:
                assert any(f"/{name}/" in path for path in held.damaged), name
            else:
                np.testing.assert_array_equal(np.stack(rows), values)

    @rule()
    def read_everything(self):
        for key, held in self.held.items():
            self.read(*key)
            if held.damaged:
                continue
            folder = self.store.storage.root / held.commit.data_folder
            for name, array in zarr.open_group(folder / GROUP, mode="r").arrays():
                np.testing.assert_array_equal(array[:], held.values[name])

    @invariant()
    def the_newest_commits_are_the_models(self):
        type(self).num_steps += 1
        for layer in self.layers:
            expected = {
                task.id: RecordName(task.id, generation)
                for task in TASKS
                if (generation := self.newest(layer, task)) is not None
            }
            assert list_records(self.store.storage, layer.folder) == expected

    @invariant()
    def nothing_committed_is_removed_or_rewritten(self):
        for held in self.held.values():
            for path, stat in held.files.items():
                if path not in held.damaged:
                    assert self.stat(path) == stat, path

    @invariant()
    def the_newest_values_are_read(self):
        if self.held:
            keys = sorted(self.held)
            self.turn += 1
            self.read(*keys[self.turn % len(keys)])


def run_machine(machine, *, examples, steps):
    machine.num_steps = machine.num_children = 0
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return machine.num_steps


def test_a_store_is_its_model_whatever_happens():
    assert run_machine(StoreMachine, examples=8, steps=25) >= 100


@pytest.mark.slow
def test_a_store_is_its_model_for_a_thousand_steps():
    assert run_machine(StoreMachine, examples=80, steps=30) >= 1000
    assert StoreMachine.num_children >= 10
