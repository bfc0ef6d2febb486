"""A store whose corpus changes, beside a plain model: tars change, move, are retired and come back.

The real ``CorpusWork``, ``rm``, ``gc`` and snapshots act on records and arrays of real attempts.
Only what an encode stage makes of a work item is done here, without models: a task's values are the
number of its tar's content. A kill is a run that ends after some of its items, in any order.
"""

import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.base.failpoints import set_failpoints
from pipeline.bench.store import make_layer
from pipeline.corpus.parts import pin_source
from pipeline.corpus.source import SourceChangedError
from pipeline.corpus.tasks import Task
from pipeline.encode.missing import CorpusWork
from pipeline.spec.fields import FeaturesSpec, LatentsSpec
from pipeline.store.attempt import Attempt
from pipeline.store.commit import (
    Accounting,
    Marks,
    RecordName,
    SourceTar,
    list_records,
    read_commit,
    record_path,
)
from pipeline.store.current import is_of_content
from pipeline.store.layout import INDEX, REJECTS, REJECTS_SCHEMA, digest_pairs, list_arrays
from pipeline.store.records import describe_commit
from pipeline.store.snapshot import create_snapshot, read_snapshot
from pipeline.store.store import Store
from pipeline.store.task_ids import list_part_ids, parse_part_id
from pipeline.upkeep.gc import list_orphans, remove_orphans
from pipeline.upkeep.rm import LayerTasks, change_tasks, find_tasks
from pipeline.upkeep.verify import verify_store
from tests.properties.test_store_machine import ROW_SHAPES, TASKS, make_index, run_machine

pytestmark = pytest.mark.thorough

LATENTS = make_layer(LatentsSpec(model="none", size=64), scaling_factor=1.0)
FEATURES = make_layer(FeaturesSpec(blocks=(6,), timesteps=(300,)), latents=LATENTS.fingerprint)
LATENTS = LATENTS.model_copy(update={"split_bytes": 1})  # so that a tar has a part a byte
LAYERS = {"latents": LATENTS, "features": FEATURES}
ONE_ROW = make_index(TASKS[0])
SHOWN = {"latents": "latent_mean", "features": "block06"}  # the array that is read
GC_STEPS = ("gc.listed", "gc.removed", "record.written", "commit.acknowledged")

numbers = st.integers(0, 10**6)


@dataclass
class Tar:
    """A tar as it is now; ``content`` stands for its bytes, ``time`` for its marks."""

    name: str
    num_parts: int
    content: int
    time: int

    @property
    def sha256(self):
        return f"{self.content:064x}"

    def as_task(self):
        url, marks = f"file:///c/{self.name}.tar", Marks(mtime=str(self.time))
        return Task(f"{self.name}-0123456789ab", url, self.num_parts, marks=marks)

    def list_ids(self):
        return list_part_ids(self.as_task().id, self.num_parts)


class ContentMachine(RuleBasedStateMachine):
    """``tars`` are all that there ever were, ``corpus`` the names of those that are there now.

    ``whole`` are those whose latents were encoded as a whole once, and whose files are there.
    """

    num_steps = num_children = 0

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="ldznet-contents-"))
        self.store = Store.open(str(self.folder / "store"))
        self.tars, self.corpus, self.whole = {}, [], set()
        self.snapshots = {}
        self.slow = []
        self.clock = 0

    @initialize(num_parts=st.integers(1, 3))
    def begin(self, num_parts):
        for layer in (LATENTS, FEATURES):
            self.store.add_layer(layer)
        self.add_tar(num_parts)

    def teardown(self):
        set_failpoints("")
        try:
            self.read_pinned()
            self.verify()
        finally:
            shutil.rmtree(self.folder)

    def tick(self):
        self.clock += 1
        return self.clock

    # The corpus.

    @precondition(lambda self: len(self.tars) < 6)
    @rule(num_parts=st.integers(1, 3))
    def add_tar(self, num_parts):
        tar = Tar(f"tar{len(self.tars)}", num_parts, self.tick(), self.tick())
        self.tars[tar.name] = tar
        self.corpus.append(tar.name)

    def choose(self, names, which):
        return self.tars[sorted(names)[which % len(names)]]

    @rule(which=numbers, back=st.booleans())
    def change_tar(self, which, back):
        """Other bytes of the same length; with ``back`` perhaps those that it had once."""
        tar = self.choose(self.corpus, which)
        tar.content = tar.content - 1 if back and tar.content > 1 else self.tick()
        tar.time = self.tick()

    @rule(which=numbers)
    def touch_tar(self, which):
        self.choose(self.corpus, which).time = self.tick()

    @precondition(lambda self: len(self.tars) < 6)
    @rule(which=numbers)
    def rename_tar(self, which):
        """The new path is a new task; the old one stays in the store until it is retired."""
        old = self.choose(self.corpus, which)
        self.add_tar(old.num_parts)
        self.tars[self.corpus[-1]].content = old.content
        self.corpus.remove(old.name)

    # Encoding.

    def list_work(self, policy):
        tars = [self.tars[name].as_task() for name in self.corpus]
        work = CorpusWork(self.store, LATENTS, FEATURES, tars, changed=policy)
        missing = work.list_missing()
        if missing.suspects:
            sha256 = {tar.as_task().url: tar.sha256 for tar in self.tars.values()}
            digests = {suspect.url: sha256[suspect.url] for suspect in missing.suspects}
            missing = work.list_missing(digests, {})
        assert not missing.suspects
        retired = [name for name in self.corpus if self.is_retired(name)]
        assert missing.num_retired == sum(self.tars[name].num_parts for name in retired)
        return missing

    @rule(seed=numbers, policy=st.sampled_from(["fail", "renew"]), num=st.integers(1, 20))
    def encode(self, seed, policy, num):
        """What a run does, in any order of its tasks; killed after ``num`` commits of a layer."""
        missing = self.list_work(policy)
        for name in self.corpus:
            expected = policy == "fail" and self.is_changed(name) and not self.is_retired(name)
            told = any(x.task.url == self.tars[name].as_task().url for x in missing.failed)
            assert told or not expected, name
        assert policy == "fail" or not missing.failed
        items = list(missing.items)
        random.Random(seed).shuffle(items)
        for item in items:
            num -= self.encode_item(item, num)
            if num <= 0:
                return
        failed = {x.task.tar_id for x in missing.failed}
        read = {kind: self.list_read(kind) for kind in LAYERS}
        for name in self.corpus:
            tar = self.tars[name]
            if not self.is_retired(name) and tar.as_task().id not in failed:
                self.whole.add(name)
                for part in tar.list_ids():
                    found = {kind: read[kind].get(part) for kind in LAYERS}
                    assert found == dict.fromkeys(LAYERS, tar.content)
        assert not self.list_work(policy).items

    @precondition(lambda self: len(self.slow) < 2)
    @rule(which=numbers, policy=st.sampled_from(["fail", "renew"]))
    def list_slowly(self, which, policy):
        items = self.list_work(policy).items
        if items:
            self.slow.append(items[which % len(items)])

    @precondition(lambda self: self.slow)
    @rule(num=st.integers(1, 2))
    def finish_slowly(self, num):
        """Whatever came since, it does no harm."""
        self.encode_item(self.slow.pop(0), num)

    def encode_item(self, item, num):
        """Do what an encode stage does, up to ``num`` commits; return how many it made."""
        tar = next(tar for tar in self.tars.values() if item.task.tar_id == tar.as_task().id)
        is_gone = tar.name not in self.corpus
        latents, made = self.encode_latents(item, tar, is_gone or item.task.marks.mtime)
        if latents is None or latents.status != "stored" or made >= num:
            return made
        generation = item.next_features
        if item.features is not None and item.latents is not None:
            return made
        if item.features is not None:
            there = self.read_record("features", item.task.id, item.features)
            if is_of_content(describe_commit(there), describe_commit(latents)):
                return made
            generation = item.features + 1
        if self.read_record("features", item.task.id, generation) is None:
            self.write(
                *("features", item.task.id, generation, int(latents.source.sha256, 16)),
                latents_generation=latents.generation,
                source_sha256=latents.source.sha256,
            )
            made += 1
        return made

    def encode_latents(self, item, tar, listed):
        """The latents of an item, None where the tar is not what it must be; and commits made."""
        task, generation = item.task, item.next_latents
        if item.latents is not None:
            return self.read_record("latents", task.id, item.latents), 0
        if there := self.read_record("latents", task.id, generation):
            return there, 0
        if listed != str(tar.time):
            return None, 0
        previous = generation and self.read_record("latents", task.id, generation - 1)
        expected = previous.source.sha256 if previous and not item.renews else item.sha256
        if expected not in (None, tar.sha256):
            return None, 0
        if task.num_parts > 1 and not item.renews and not (previous and previous.content_since):
            try:
                pin_source(self.store.storage, LATENTS.folder, task, tar.sha256)
            except SourceChangedError:
                return None, 0
        is_same = bool(previous) and previous.source.sha256 == tar.sha256
        source = {"sha256": tar.sha256, "head_sha256": tar.sha256, "marks": task.marks}
        account = dict.fromkeys(("rejected_samples", "rejected_members"), 0)
        rows = ONE_ROW.num_rows
        return self.write(
            *("latents", task.id, generation, tar.content),
            content_since=previous.content_since if is_same else generation,
            source=SourceTar(url=task.url, num_bytes=task.num_bytes, **source),
            accounting=Accounting(samples=rows, stored_samples=rows, **account),
        ), 1

    def write(self, kind, task, generation, content, **fields):
        layer = LAYERS[kind]
        with Attempt(self.store.storage, layer, task, generation=generation) as attempt:
            kinds = list_arrays(layer)
            shapes = {name: ROW_SHAPES[name] for name in kinds} | {
                "timestep": (1,),
                "block06": (1, 2, 1, 2),
            }
            shapes = {name: shapes[name] for name in kinds}
            for name, array in attempt.open_arrays(shapes).items():
                rows = np.full((ONE_ROW.num_rows, *shapes[name]), content)
                array.append_rows(rows.astype(kinds[name].dtype))
            if kind == "latents":
                attempt.write_table(INDEX, ONE_ROW)
                attempt.write_table(REJECTS, pa.Table.from_pylist([], schema=REJECTS_SCHEMA))
            commit, result = attempt.commit(
                rows=dict.fromkeys(("pairs", "views", "prompts"), ONE_ROW.num_rows),
                pairs_sha256=digest_pairs(ONE_ROW),  # phrases are equal in all contents
                provenance={},
                **fields,
            )
        assert result == "won"
        return commit

    # Retiring.

    def list_stored(self):
        ids = set(list_records(self.store.storage, LATENTS.folder))
        return [name for name, tar in self.tars.items() if not ids.isdisjoint(tar.list_ids())]

    def read_newest(self, kind, name):
        newest = list_records(self.store.storage, LAYERS[kind].folder)
        ids = [task for task in self.tars[name].list_ids() if task in newest]
        return [self.read_record(kind, *newest[task]) for task in ids]

    def is_retired(self, name):
        """As a whole, where any of its latents' records says so."""
        return any(x.status in ("retired", "removed") for x in self.read_newest("latents", name))

    def is_changed(self, name):
        sha256 = self.tars[name].sha256
        return any(x.source.sha256 != sha256 for x in self.read_newest("latents", name))

    @precondition(list_stored)
    @rule(which=numbers, returns=st.booleans(), num=st.integers(1, 8))
    def retire(self, which, returns, num):
        """A task is retired or taken back; killed after ``num`` records."""
        tar = self.choose(self.list_stored(), which)
        for found in find_tasks(self.store, [f"{tar.name}.tar"], returns=returns):
            some = LayerTasks(found.layer, returns, found.tasks[:num])
            num -= len(some.tasks)
            done = [status for statuses in change_tasks(self.store, some) for status in statuses]
            if "vacant" in done and found.layer == LATENTS.folder:
                self.whole.discard(tar.name)
            if len(some.tasks) < len(found.tasks) or num <= 0:
                return
        assert self.is_retired(tar.name) != returns
        assert (
            all(x.status != "retired" for x in self.read_newest("features", tar.name))
            or not returns
        )

    # Snapshots, gc, verify.

    @rule()
    def pin(self):
        made = create_snapshot(self.store, [LATENTS.folder, FEATURES.folder])
        self.snapshots[made.digest] = {
            kind: {record.task: self.read_content(kind, record) for record in records}
            for kind in LAYERS
            for records in [made.records[LAYERS[kind].folder]]
        }

    @precondition(lambda self: self.snapshots)
    @rule(which=numbers)
    def forget(self, which):
        digest = sorted(self.snapshots)[which % len(self.snapshots)]
        del self.snapshots[digest]
        self.store.storage.remove_tree(f"snapshots/{digest}.json")

    @rule()
    def read_pinned(self):
        """Old snapshots read what they named, whatever came since."""
        for digest, expected in self.snapshots.items():
            records = read_snapshot(self.store, digest).records
            for kind, contents in expected.items():
                found = records[LAYERS[kind].folder]
                assert {r.task: self.read_content(kind, r) for r in found} == contents

    @rule(step=st.sampled_from(GC_STEPS), at=st.integers(1, 3), fails=st.booleans())
    def collect(self, step, at, fails):
        """All files of retired tasks go that no snapshot names; a kill leaves no wrong record."""
        set_failpoints(f"{step}@{at}=raise" if fails else "")
        try:
            list(remove_orphans(self.store, list_orphans(self.store)))
        except OSError:
            assert fails
            return
        finally:
            set_failpoints("")
            self.read_pinned()
        for kind, layer in LAYERS.items():
            named = {task for held in self.snapshots.values() for task in held[kind]}
            for task, record in list_records(self.store.storage, layer.folder).items():
                status = self.read_record(kind, *record).status
                assert status != "retired" or task in named
                left = list(self.store.storage.list_files(f"{layer.folder}/data/{task}"))
                assert not (left and status in ("removed", "vacant")) or task in named

    @rule()
    def verify(self):
        assert [damage for check in verify_store(self.store) for damage in check.damage] == []

    # Reading.

    def read_record(self, kind, task, generation):
        """A record, None where there is none."""
        record = RecordName(task, generation)
        there = self.store.storage.exists(record_path(LAYERS[kind].folder, *record))
        return read_commit(self.store.storage, LAYERS[kind].folder, record) if there else None

    def read_content(self, kind, record):
        """The content that a record's values are of, by the values and by what the record says."""
        commit = self.read_record(kind, *record)
        assert commit.status == "stored"
        array = self.store.open_array(LAYERS[kind], commit, SHOWN[kind])
        (value,) = np.unique(np.stack(array.read_rows(range(array.num_rows))))
        source = commit.source.sha256 if kind == "latents" else commit.source_sha256
        assert int(source, 16) == value
        return int(value)

    def list_read(self, kind):
        made = create_snapshot(self.store, [LATENTS.folder, FEATURES.folder], write=False)
        records = made.records[LAYERS[kind].folder]
        return {record.task: self.read_content(kind, record) for record in records}

    @invariant()
    def readers_see_one_content_of_each_tar_and_none_that_is_retired(self):
        type(self).num_steps += 1
        latents, features = self.list_read("latents"), self.list_read("features")
        assert features.items() <= latents.items()
        contents = {}
        for task, content in latents.items():
            tar_id = (parse_part_id(task) or (task,))[0]
            assert contents.setdefault(tar_id, content) == content
        for name, tar in self.tars.items():
            if self.is_retired(name):
                assert latents.keys().isdisjoint(tar.list_ids())
            elif name in self.whole:
                assert latents.keys() >= set(tar.list_ids()), name


def test_a_store_is_read_rightly_whatever_its_corpus_does():
    assert run_machine(ContentMachine, examples=8, steps=25) >= 100


@pytest.mark.slow
def test_a_store_is_read_rightly_for_a_thousand_steps():
    assert run_machine(ContentMachine, examples=80, steps=30) >= 1000
