"""Retiring tasks and taking it back: what readers, encode, verify, inspect and gc then see."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.__main__ import app
from pipeline.bench.store import make_layer
from pipeline.encode.prepare import prepare_encode
from pipeline.read.reader import PairReader
from pipeline.read.source import open_layers
from pipeline.spec.fields import LatentsSpec
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.commit import (
    Commit,
    RecordName,
    SourceTar,
    list_records,
    new_attempt,
    read_commit,
    write_commit,
)
from pipeline.store.current import list_current
from pipeline.store.snapshot import create_snapshot, read_snapshot
from pipeline.store.store import Store
from pipeline.upkeep.gc import list_orphans, remove_orphans
from pipeline.upkeep.inspect import inspect_store
from pipeline.upkeep.rm import change_tasks, find_tasks
from pipeline.upkeep.verify import verify_store

GOLDEN = Path(__file__).parents[2] / "golden"
STORE_PAGE = Path(__file__).parents[3] / "docs" / "reference" / "store.md"
TAR = "scenes-val-00000.tar"


@pytest.fixture
def store(copied_store):
    return Store.open(str(copied_store))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def rm(store, *arguments):
    result = run("rm", store.storage.url, *arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def read_all(store, snapshot=None):
    """Mean of latents and features of every pair by (key, phrase, place)."""
    source = open_layers(store, snapshot=snapshot)
    reader = PairReader(source, tasks="*", inputs=frozenset({"latent", "features"}), blocks=(6,))
    batch = reader.read(range(len(reader)), draws=[0] * len(reader))
    return {
        (key, phrase, place): (
            batch.inputs["latent"][place].sum().item(),
            batch.inputs["features"][6][place].float().sum().item(),
        )
        for place, (key, phrase) in enumerate(zip(batch.keys, batch.phrases, strict=True))
    }


def list_status(store, name="val"):
    """The status of the newest records of a tar's tasks, latents first."""
    found = []
    for layer in store.list_layers():
        for task, record in list_records(store.storage, layer.folder).items():
            if name in task:
                found.append(read_commit(store.storage, layer.folder, record).status)
    return found


def find_damage(store):
    return [damage for check in verify_store(store) for damage in check.damage]


def prepare(store, corpus_folder, spec, **options):
    patterns = [str(corpus_folder / "*.tar")]
    return prepare_encode(spec, patterns, store.storage.url, batch=8, **options)


def collect(store):
    return list(remove_orphans(store, list_orphans(store)))


def test_nothing_reads_a_retired_task_until_it_is_taken_back(store, corpus_folder, spec):
    before = read_all(store)
    for _ in range(2):  # a second time there is nothing to do
        said = rm(store, "--task", TAR)
        assert list_status(store) == ["retired", "retired"]
        after = read_all(store)
        assert {key.split("-")[0] for key, *_ in after} == {"train"}
        kept = prepare(store, corpus_folder, spec)
        assert (kept.items, kept.num_tasks) == ((), 2)
        assert "2 tasks: 2 committed, 0 to encode, 1 retired and left alone" in kept.describe()
        assert find_damage(store) == []
        for layer in inspect_store(store.storage.url):
            assert (layer.num_tasks, layer.num_retired) == (2, 1)
    assert "0 tasks retired, 0 pairs, 0.0 MB (1 already)" in said
    assert all(record.generation < 2 for record in list_all_records(store))
    rm(store, "--task", TAR, "--unretire")
    assert read_all(store) == before
    assert find_damage(store) == []
    assert prepare(store, corpus_folder, spec).items == ()


def list_all_records(store):
    return [
        record
        for layer in store.list_layers()
        for record in list_records(store.storage, layer.folder).values()
    ]


def test_a_dry_run_shows_what_it_would_do(store):
    said = rm(store, "--task", TAR, "--dry-run")
    assert re.search(r"^latents-\w+: 1 task to be retired, 12 pairs, 0.2 MB$", said, re.MULTILINE)
    assert re.search(r"^  scenes-val-00000-\w+$", said, re.MULTILINE)
    assert list_status(store) == ["stored", "stored"]


@pytest.mark.parametrize(
    ("pattern", "num"),
    [
        ("scenes-val-00000-*", 1),  # an id
        ("{corpus}/scenes-val-00000.tar", 1),
        ("file://{corpus}/scenes-val-*.tar", 1),
        ("{folder}/*-val-*.tar", 1),  # the end of a path
        ("scenes-train-{{00000..00001}}.tar", 2),
        ("scenes-*.tar", 3),
        ("/**/scenes-t*.tar", 2),
        ("*", 3),
    ],
)
def test_a_tar_is_named_in_many_ways(store, corpus_folder, pattern, num):
    text = pattern.format(corpus=corpus_folder, folder=corpus_folder.name)
    assert [len(found.tasks) for found in find_tasks(store, [text])] == [num, num]


@pytest.mark.parametrize("pattern", ["{corpus}/../*.tar", "/*.tar", "val", "*.jpg", ""])
def test_a_pattern_that_matches_nothing_is_an_error(store, corpus_folder, pattern):
    """Also beside one that matches: nothing is done then."""
    text = pattern.format(corpus=corpus_folder)
    result = run("rm", store.storage.url, "--task", TAR, "--task", text)
    assert result.exit_code == 2
    assert f"--task: {text!r}: no task of" in result.stderr
    assert list_status(store) == ["stored", "stored"]


def test_what_is_to_go_must_be_named(store):
    result = run("rm", store.storage.url)
    assert (result.exit_code, "--task: expected a pattern" in result.stderr) == (2, True)


def test_a_snapshot_taken_before_reads_on_and_keeps_the_files(store, caplog):
    before = read_all(store)
    pinned = create_snapshot(store, [layer.folder for layer in store.list_layers()])
    rm(store, "--task", TAR)
    assert collect(store) == []
    assert "the files of 2 retired tasks stay: snapshots name them" in caplog.text
    assert read_all(store, read_snapshot(store, pinned.digest)) == before
    assert create_snapshot(store, pinned.records) != pinned


def test_a_snapshot_that_cannot_be_read_keeps_every_file(store, caplog):
    rm(store, "--task", TAR)
    store.storage.write_content("snapshots/0123456789abcdef.json", b"{}")
    assert collect(store) == []
    assert "it may name any task, so no retired task's files are removed" in caplog.text
    assert list_status(store) == ["retired", "retired"]


def test_gc_removes_the_files_and_encode_makes_them_anew(store, corpus_folder, spec):
    before = read_all(store)
    rm(store, "--task", TAR)
    assert len(collect(store)) == 2
    assert list_status(store) == ["removed", "removed"]
    assert not any("val" in path for path, _ in store.storage.list_files() if "/data/" in path)
    assert find_damage(store) == []
    assert prepare(store, corpus_folder, spec).items == ()
    rm(store, "--task", TAR)
    said = rm(store, "--task", TAR, "--unretire")
    assert "1 of them without their files, which gc has removed" in said
    assert list_status(store) == ["vacant", "vacant"]
    assert find_damage(store) == []
    lacking = prepare(store, corpus_folder, spec)
    (item,) = lacking.items
    assert EncodeStage(lacking.config).encode(item).status == "committed"
    assert read_all(store) == before
    assert find_damage(store) == []
    assert collect(store) == []


def test_what_returns_between_the_listing_and_the_removal_stays(store):
    before = read_all(store)
    rm(store, "--task", TAR)
    orphans = list(list_orphans(store))
    rm(store, "--task", TAR, "--unretire")
    assert list(remove_orphans(store, iter(orphans))) == []
    assert read_all(store) == before


def test_the_gc_command_calls_them_what_they_are(store):
    rm(store, "--task", TAR)
    said = run("gc", store.storage.url).stdout.splitlines()[-2:]
    assert said[0] == "0 orphans removed, 0.0 MB"
    assert re.fullmatch(r"files of retired tasks removed: 2 folders, \d\.\d MB", said[1])


def test_a_second_rm_shows_no_progress_over_nothing(store):
    rm(store, "--task", TAR)
    again = run("rm", store.storage.url, "--task", TAR)
    assert "0/0" not in again.stderr
    assert "0 tasks retired, 0 pairs, 0.0 MB (1 already)" in again.stdout


@pytest.mark.thorough
def test_files_that_a_killed_gc_left_go_whatever_came_since(store, corpus_folder, spec, writers):
    rm(store, "--task", TAR)
    status, _ = writers.run("gc", store.storage.url, failpoints="commit.acknowledged=kill")
    assert (status, list_status(store)) == (-9, ["removed", "retired"])
    left = store.storage.root / next(store.storage.list_files())[0].split("/")[0]
    assert left.is_dir()
    rm(store, "--task", TAR, "--unretire")
    assert list_status(store) == ["vacant", "stored"]
    lacking = prepare(store, corpus_folder, spec)
    EncodeStage(lacking.config).encode(*lacking.items)
    before = read_all(store)
    (gone,) = collect(store)
    assert re.fullmatch(r"latents-\w+/data/scenes-val-\S+/0000-\w+", gone.path)
    assert read_all(store) == before


@pytest.mark.thorough
@pytest.mark.parametrize("step", ["record.written", "record.created", "commit.acknowledged"])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("returns", [False, True])
def test_killed_at_any_step_and_run_again(store, writers, step, at, returns):
    """In between, the task is there for readers as a whole or not at all."""
    before = read_all(store)
    arguments = ["rm", store.storage.url, "--task", TAR]
    if returns:
        rm(store, "--task", TAR)
        arguments += ["--unretire"]
    assert writers.run(*arguments, failpoints=f"{step}@{at}=kill")[0] == -9
    between = read_all(store)
    assert between == before or {key[0].split("-")[0] for key in between} == {"train"}
    assert find_damage(store) == []
    assert writers.run(*arguments)[0] == 0
    assert list_status(store) == ["stored" if returns else "retired"] * 2
    assert (read_all(store) == before) == returns


def test_a_record_that_comes_first_is_retired_in_its_turn(store):
    """A repair, say, between the listing and the record."""
    found = find_tasks(store, [TAR])
    for layer in found:
        (task,) = layer.tasks
        there = read_commit(store.storage, layer.layer, task.record)
        newer = there.model_copy(update={"generation": 1, "attempt": new_attempt(1), "files": ()})
        assert write_commit(store.storage, newer) == "won"
        assert list(change_tasks(store, layer)) == [["retired"]]
        last = read_commit(store.storage, layer.layer, RecordName(there.task, 2))
        assert last.attempt == newer.attempt


def test_a_damaged_record_of_a_retired_task_is_replaced(store, copied_store):
    rm(store, "--task", TAR)
    layer = store.list_layers()[0].folder
    (damaged,) = (copied_store / layer / "commits").glob("*-val-*.0001.json")
    damaged.write_text("{")
    assert len(find_damage(store)) == 1
    rm(store, "--task", TAR)
    rm(store, "--task", damaged.name.split(".")[0])
    assert find_damage(store) == []
    assert list_status(store) == ["retired", "retired"]


def test_encode_that_is_overtaken_makes_nothing_of_it(store, corpus_folder, spec):
    """The task was listed before its features were there, and is retired when it comes."""
    features = store.list_layers()[1].folder
    shutil.rmtree(store.storage.root / features / "commits")
    shutil.rmtree(store.storage.root / features / "data")
    lacking = prepare(store, corpus_folder, spec, damage=[])
    (item,) = [item for item in lacking.items if "val" in item.task.id]
    latents = store.list_layers()[0].folder
    rm(store, "--task", TAR)
    overtaken = type(item)(item.task, None, None, next_latents=1)
    assert EncodeStage(lacking.config).encode(overtaken).status == "lost"
    assert list_records(store.storage, features) == {}
    assert list_records(store.storage, latents)[item.task.id].generation == 1


def test_a_task_of_the_first_version_is_retired_and_returns(tmp_path):
    """Its files have another form than those of today, and attempts that tell no generation."""
    store = Store.open(str(shutil.copytree(GOLDEN / "store_v1", tmp_path / "store")))
    snapshot = next(store.storage.list_names("snapshots")).removesuffix(".json")

    def read():
        source = open_layers(store, features=store.list_layers()[1].folder)
        reader = PairReader(source, tasks="*", inputs=frozenset({"latent"}))
        batch = reader.read(range(len(reader)), draws=[0] * len(reader))
        return sorted(batch.inputs["latent"].sum((1, 2, 3)).tolist())

    before = read()
    assert "scenes-val-00000-7e9362a5" in rm(store, "--task", "*-val-*", "--dry-run")
    rm(store, "--task", "*-val-*")
    assert list_status(store) == ["retired"] * 3
    assert 0 < len(read()) < len(before)
    rm(store, "--task", "*-val-*", "--unretire")
    assert read() == before
    assert find_damage(store) == []
    rm(store, "--task", "*-val-*")
    assert collect(store) == []
    (store.storage.root / f"snapshots/{snapshot}.json").unlink()
    assert len(collect(store)) == 3
    assert list_status(store) == ["removed"] * 3
    assert find_damage(store) == []


@pytest.mark.thorough
def test_the_reading_snippet_skips_it(store):
    (snippet,) = re.findall(r"```python\n(.*?)```", STORE_PAGE.read_text(), re.DOTALL)
    shown = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", snippet],
            cwd=store.storage.root.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout.splitlines())
        rm(store, "--task", TAR)
    assert (len(shown[0]), len(shown[1])) == (3, 2)


@pytest.fixture
def parts(tmp_path):
    """A latents layer with two of a tar's three parts, and its records' layer."""
    store = Store.open(str(tmp_path / "parts"))
    layer = make_layer(LatentsSpec(model="none", size=64), scaling_factor=1.0)
    store.add_layer(layer)
    source = SourceTar(
        url="file:///c/data[v1]/long.tar", num_bytes=1, sha256="0" * 64, head_sha256="0" * 64
    )
    rows = dict.fromkeys(("pairs", "views", "prompts", "masks", "ignores"), 0)
    for part in ("long-0123456789ab-p0000of0003", "long-0123456789ab-p0002of0003"):
        commit = Commit(
            layer=layer.folder,
            task=part,
            generation=0,
            attempt=new_attempt(0),
            rows=rows,
            pairs_sha256="0" * 64,
            source=source,
            files=(),
        )
        assert write_commit(store.storage, commit) == "won"
    return store, layer.folder


@pytest.mark.parametrize(
    "pattern",
    ["long.tar", "long-*-p0002of0003", "long-0123456789ab", "data[v1]/*.tar", "data[[]v1]/l*.tar"],
)
def test_the_parts_of_a_tar_go_together(parts, pattern):
    """Also the one that was never encoded: encode must not add a part of a tar that is retired."""
    store, layer = parts
    rm(store, "--task", pattern)
    found = list_current(store, layer)
    assert found.current == {}
    assert found.retired == {f"long-0123456789ab-p000{part}of0003" for part in range(3)}
    rm(store, "--task", pattern, "--unretire")
    assert len(list_current(store, layer).current) == 2


def test_of_a_tar_in_parts_one_that_is_retired_retires_all(parts):
    """As a kill leaves it: readers never see a part of a tar alone."""
    store, layer = parts
    task = "long-0123456789ab-p0002of0003"
    retired = read_commit(store.storage, layer, RecordName(task, 0)).restate(
        "retired", generation=1
    )
    assert write_commit(store.storage, retired) == "won"
    assert list_current(store, layer).current == {}
    (found,) = find_tasks(store, [task])
    assert ([some.record.task[-10:] for some in found.tasks], found.num_done) == (["0000of0003"], 1)
