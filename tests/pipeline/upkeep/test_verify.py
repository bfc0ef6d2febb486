"""Verification: every class of damage is found and named, a sound store has none."""

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pipeline.store.array_writer
import pipeline.upkeep.verify
from jobs.__main__ import app
from pipeline.base.yaml import SpecError
from pipeline.corpus.tasks import list_tasks
from pipeline.encode.prepare import prepare_encode
from pipeline.spec.fields import LatentsSpec, Spec
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.commit import (
    DamagedStoreError,
    NewerRecordError,
    list_records,
    record_path,
)
from pipeline.store.layout import GROUP, INDEX, REJECTS
from pipeline.store.store import MissingStoreError, Store
from pipeline.upkeep.inspect import inspect_store
from pipeline.upkeep.verify import (
    Damage,
    VerifyTotals,
    count_commits,
    describe_damage,
    read_damage,
    verify_store,
)
from tests.support.missing import list_missing


def verify(folder):
    totals = VerifyTotals()
    for check in verify_store(Store.open(str(folder))):
        totals.add(check)
    return totals


@pytest.fixture
def commits(copied_store):
    """{kind: the first task's commit}."""
    store = Store.open(str(copied_store))
    return {
        layer.kind: next(iter(store.newest_commits(layer.folder).values()))
        for layer in store.list_layers()
    }


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:-num_bytes])


def edit(path, **changes):
    """Change keys of a JSON file, its seal with them; a dict is merged into the one there."""
    plain = json.loads(path.read_text())
    plain.pop("record_sha256", None)
    for key, value in changes.items():
        plain[key] = plain[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(plain))


def test_a_sound_store_has_no_damage(store_folder):
    totals = verify(store_folder)
    assert totals.damage == []
    store = Store.open(str(store_folder))
    listed = [
        file
        for layer in store.list_layers()
        for commit in store.newest_commits(layer.folder).values()
        for file in commit.files
    ]
    assert totals.num_commits == count_commits(store) == 6
    assert totals.num_files == len(listed)
    assert totals.num_bytes == sum(file.num_bytes for file in listed)
    assert describe_damage([], verify=VERIFY) == []


VERIFY = "ldznet verify store"
SHARD = f"{GROUP}/latent_mean/c/0/0/0/0"
FEATURE = f"{GROUP}/block06/c/0/0/0/0/0"

FILE_DAMAGE = {
    "group metadata": ("latents", f"{GROUP}/zarr.json", lambda p: flip(p, 5), "SHA-256"),
    "array metadata": ("latents", f"{GROUP}/text/zarr.json", lambda p: flip(p, 40), "SHA-256"),
    "latent byte": ("latents", SHARD, lambda p: flip(p, 10), "expected SHA-256"),
    "feature byte": ("features", FEATURE, lambda p: flip(p, 10), "expected SHA-256"),
    "shard index byte": ("features", FEATURE, lambda p: flip(p, -6), "expected SHA-256"),
    "cut shard": ("features", FEATURE, lambda p: cut(p, 1), r"expected \d+ bytes, got \d+"),
    "longer shard": ("latents", SHARD, lambda p: p.write_bytes(p.read_bytes() + b"\0"), "bytes"),
    "empty shard": ("latents", SHARD, lambda p: p.write_bytes(b""), "bytes, got 0"),
    "deleted shard": ("latents", SHARD, lambda p: p.unlink(), "^missing$"),
    "folder in its place": ("latents", SHARD, lambda p: (p.unlink(), p.mkdir()), "directory"),
    "deleted feature": ("features", FEATURE, lambda p: p.unlink(), "^missing$"),
    "index": ("latents", INDEX, lambda p: flip(p, 100), "expected SHA-256"),
    "rejects": ("latents", REJECTS, lambda p: flip(p, 100), "expected SHA-256"),
}


@pytest.mark.parametrize("name", FILE_DAMAGE)
def test_a_damaged_file_is_named(copied_store, commits, name):
    kind, path, damage, what = FILE_DAMAGE[name]
    commit = commits[kind]
    damage(copied_store / commit.data_folder / path)
    (found,) = verify(copied_store).damage
    assert (found.layer, found.task, found.generation) == (commit.layer, commit.task, 0)
    assert found.path == f"{commit.data_folder}/{path}"
    assert re.search(what, found.what)


def without(commit, name):
    """The record's list of files without one."""
    return [file.model_dump() for file in commit.files if not file.path.endswith(f"/{name}")]


RECORD_DAMAGE = {
    "cut": ("latents", lambda p, c: cut(p, 20), "cannot be read"),
    "not JSON": ("features", lambda p, c: p.write_bytes(b"\xff\0"), "cannot be read"),
    "another task's": ("latents", lambda p, c: edit(p, task="x"), "record is that of"),
    "unknown key": ("latents", lambda p, c: edit(p, surprise=1), "cannot be read"),
    "no version": ("latents", lambda p, c: edit(p, schema_version=0), "cannot be read"),
    "a path that leaves": (
        "latents",
        lambda p, c: edit(p, files=[c.files[0].model_dump() | {"path": "../../x"}]),
        "inside the store",
    ),
    "another's file": ("latents", lambda p, c: edit(p, attempt="0000-00"), "file outside"),
    "its views": ("latents", lambda p, c: edit(p, rows={"views": 3}), r"shape|in 0\.\.2"),
    "its pairs": ("latents", lambda p, c: edit(p, rows={"pairs": 1}), r"expected 1 rows|shape"),
    "features' pairs": ("features", lambda p, c: edit(p, rows={"pairs": 1}), "shape"),
    "pairs' digest": ("latents", lambda p, c: edit(p, pairs_sha256="0" * 64), "pairs are not|rows"),
    "features' digest": ("features", lambda p, c: edit(p, pairs_sha256="0" * 64), "rows are not"),
    "unbalanced": ("latents", lambda p, c: edit(p, accounting={"samples": 5}), "of 5 samples"),
    "balanced, yet wrong": (
        "latents",
        lambda p, c: edit(p, accounting={"stored_samples": 3, "rejected_samples": 1}),
        r"accounting: of 4 .*'stored_samples': 3, .*the tables hold {'stored_samples': 4",
    ),
    "rejected member": (
        "latents",
        lambda p, c: edit(p, accounting={"rejected_members": 1}),
        "'rejected_members': 1.*hold.*'rejected_members': 0",
    ),
    "rejected pair": (
        "latents",
        lambda p, c: edit(p, accounting={"rejected_pairs": 1}),
        "'rejected_pairs': 1.*hold.*'rejected_pairs': 0",
    ),
    "reasons": (
        "latents",
        lambda p, c: edit(p, accounting={"rejects": {"bad_image": 1}}),
        "'bad_image': 1.*hold.*'rejects': {}",
    ),
    "no accounting": ("latents", lambda p, c: edit(p, accounting=None), "no accounting"),
    "no source": ("latents", lambda p, c: edit(p, source=None), "no source"),
    "file's digest": (
        "latents",
        lambda p, c: edit(
            p,
            files=[
                c.files[0].model_dump() | {"sha256": "0" * 64},
                *(file.model_dump() for file in c.files[1:]),
            ],
        ),
        "SHA-256 000000000000",
    ),
    "no index": ("latents", lambda p, c: edit(p, files=without(c, INDEX)), "does not list it"),
    "no rejects": ("latents", lambda p, c: edit(p, files=without(c, REJECTS)), "does not list it"),
    "no shard": ("features", lambda p, c: edit(p, files=without(c, FEATURE)), "does not list it"),
    "no group": (
        "features",
        lambda p, c: edit(p, files=without(c, f"{GROUP}/zarr.json")),
        "does not list it",
    ),
    "no files": ("latents", lambda p, c: edit(p, files=[]), "does not list it"),
}


def test_a_record_of_a_newer_version_ends_it_and_is_no_damage(copied_store, commits):
    edit(copied_store / commits["features"].name, schema_version=3)
    with pytest.raises(NewerRecordError, match=r"written by a newer ldznet .*version 3.*up to 2"):
        verify(copied_store)


@pytest.mark.parametrize("name", RECORD_DAMAGE)
def test_a_damaged_record_is_named(copied_store, commits, name):
    kind, damage, what = RECORD_DAMAGE[name]
    commit = commits[kind]
    damage(copied_store / commit.name, commit)
    found = verify(copied_store).damage
    assert {(d.task, d.generation) for d in found} == {(commit.task, 0)}
    assert commit.layer in {d.layer for d in found}
    assert all(re.search(what, d.what) for d in found), found


def rewrite(copied_store, commit, name, data):
    """Alter a file and put its new digest into the record, as no accident does."""
    path = copied_store / commit.data_folder / name
    path.write_bytes(data)
    listed = f"{commit.data_folder}/{name}".removeprefix(f"{commit.layer}/")
    entry = {
        "path": listed, "num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    edit(copied_store / commit.name, files=[*without(commit, name), entry])


def test_what_is_as_committed_is_still_held_to_the_spec(copied_store, commits):
    """A wrong index of a shard, wrong metadata, a table of other columns."""
    commit = commits["latents"]
    shard = bytearray((copied_store / commit.data_folder / SHARD).read_bytes())
    shard[-6] ^= 1
    rewrite(copied_store, commit, SHARD, bytes(shard))
    (found,) = verify(copied_store).damage
    assert found.path.endswith(SHARD)
    assert "the shard's index is damaged" in found.what


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        (f"{GROUP}/mask/zarr.json", b'{"zarr_format": 3}', "cannot be read"),
        (INDEX, b"PAR1", "Parquet"),
        (REJECTS, None, "columns"),
    ],
)
def test_files_that_never_were_right_are_named(copied_store, commits, name, data, what):
    commit = commits["latents"]
    if data is None:
        data = (copied_store / commit.data_folder / INDEX).read_bytes()
    rewrite(copied_store, commit, name, data)
    (found,) = verify(copied_store).damage
    assert what in found.what


def test_two_shards_of_an_array_that_changed_places_are_both_named(
    tmp_path, corpus_folder, ldm_folder, monkeypatch
):
    monkeypatch.setattr(pipeline.store.array_writer, "MAX_SHARD_ROWS", 2)
    spec = Spec(latents=LatentsSpec(model=str(ldm_folder), size=64))
    tars = str(corpus_folder / "scenes-val-*.tar")
    run = prepare_encode(spec, [tars], str(tmp_path / "store"), batch=8)
    assert EncodeStage(run.config).encode(run.items[0]).status == "committed"
    assert verify(tmp_path / "store").damage == []
    first, second = sorted((tmp_path / "store").rglob("latent_mean/c/*/0/0/0"))
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    damage = verify(tmp_path / "store").damage
    assert sorted(d.path for d in damage) == [
        str(path.relative_to(tmp_path / "store")) for path in (first, second)
    ]


def test_features_whose_latents_are_not_committed_are_named(copied_store, commits):
    (copied_store / commits["latents"].name).unlink()
    (found,) = verify(copied_store).damage
    assert (found.layer, found.path) == (commits["features"].layer, commits["features"].name)
    assert "are not there" in found.what


def test_features_without_their_layer_are_named(copied_store, commits):
    shutil.rmtree(copied_store / commits["latents"].layer)
    damage = verify(copied_store).damage
    assert {d.layer for d in damage} == {commits["features"].layer}
    assert len(damage) == 3


def test_a_damaged_spec_is_an_error_and_no_verdict(copied_store, commits):
    path = copied_store / commits["latents"].layer / "spec.json"
    flip(path, 100)
    with pytest.raises(DamagedStoreError, match=r"spec\.json: is "):
        verify(copied_store)
    path.unlink()
    with pytest.raises(DamagedStoreError, match=r"spec\.json: is missing"):
        verify(copied_store)


def test_no_store_is_an_error(tmp_path):
    with pytest.raises(SpecError, match="expected a store, found no layer"):
        verify(tmp_path)


def test_commits_made_while_it_runs_are_no_damage(copied_store, commits, monkeypatch):
    """A task commits its latents, then its features: both between the two listings here."""
    names = [copied_store / commits[kind].name for kind in ("latents", "features")]
    for name in names:
        name.rename(name.with_suffix(".later"))
    calls = []

    def list_and_commit(storage, layer):
        found = list_records(storage, layer)
        if not calls:
            for name in names:
                name.with_suffix(".later").rename(name)
        calls.append(layer)
        return found

    monkeypatch.setattr(pipeline.upkeep.verify, "list_records", list_and_commit)
    assert verify(copied_store).damage == []
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("number", "is_damage"),
    [(errno.EIO, True), (errno.EACCES, False), (errno.EMFILE, False)],
)
def test_only_what_is_wrong_with_a_file_is_damage(copied_store, monkeypatch, number, is_damage):
    """A denied or failing storage would else have a whole store encoded anew."""
    store = Store.open(str(copied_store))
    real = store.storage.digest

    def fail(path):
        if path.endswith(REJECTS):
            raise OSError(number, os.strerror(number), path)
        return real(path)

    monkeypatch.setattr(store.storage, "digest", fail)
    if is_damage:
        damage = [d for check in verify_store(store) for d in check.damage]
        assert [Path(d.path).name for d in damage] == [REJECTS] * 3
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            list(verify_store(store))


def test_the_newest_generation_is_checked(copied_store, commits):
    commit = commits["features"]
    newer = commit.model_copy(update={"generation": 1})
    (copied_store / newer.name).write_text(newer.model_dump_json())
    (copied_store / commit.name).write_text("{")
    assert verify(copied_store).damage == []
    (copied_store / newer.name).write_text("{")
    (found,) = verify(copied_store).damage
    assert found.generation == 1
    assert found.path == record_path(commit.layer, commit.task, 1)


def test_a_report_is_read_back(tmp_path):
    damage = [Damage("latents-1", "a", 2, "p/ä", "was\n"), Damage("features-1", "b", 0, "q", "")]
    totals = VerifyTotals()
    totals.add(VerifyTotals(1, 1, 2, damage))
    totals.write(tmp_path / "report.json")
    assert read_damage(tmp_path / "report.json") == damage


@pytest.mark.parametrize(
    "text",
    [
        None, "{", "[]", '{"schema_version": 2, "damage": []}', '{"schema_version": 1}',
        '{"schema_version": 1, "damage": [{"layer": "x"}]}', '{"schema_version": 1, "damage": [1]}',
    ],
)  # fmt: skip
def test_what_is_no_report_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(SpecError, match=r"report\.json: expected "):
        read_damage(tmp_path / "report.json")


@pytest.mark.parametrize("data", [bytes(4000), b"\xff" * 4000])
def test_a_binary_file_in_place_of_a_report_is_not_printed(tmp_path, data):
    (tmp_path / "report.json").write_bytes(data)
    with pytest.raises(SpecError, match=r"got (JSONDecode|UnicodeDecode)Error: ") as raised:
        read_damage(tmp_path / "report.json")
    assert len(str(raised.value)) < 500


def test_damage_is_described_in_bounded_lines():
    damage = [Damage("latents-1", f"t{i % 3}", 0, f"p{i}", "x") for i in range(25)]
    lines = describe_damage(damage, verify=VERIFY)
    assert len(lines) == 22
    assert lines[20].startswith("… and 5 more")
    assert lines[21].startswith("3 tasks damaged. Nothing was changed.")
    assert f"{VERIFY} --report damage.json, then the command" in lines[21]
    (_, line) = describe_damage(damage[:1], verify=VERIFY, report="d.json")
    assert line.endswith(": the command that encoded them with --repair d.json")


def test_a_table_of_records_that_differs_is_damage_of_the_cache(
    copied_store, corpus_folder, commits, monkeypatch
):
    monkeypatch.setattr("pipeline.store.records.MIN_KEPT", 1)
    commit = commits["features"]
    path = copied_store / commit.name
    sound = path.read_bytes()
    edit(path, pairs_sha256="0" * 64)
    inspect_store(str(copied_store))  # keeps a row of what the record said then
    path.write_bytes(sound)
    (damage,) = verify(copied_store).damage
    assert damage.path == f"{commit.layer}/inventory"
    assert re.search(r"says pairs_sha256 '0+' instead of .* it is a cache: remove", damage.what)
    assert len(describe_damage([damage], verify=VERIFY)) == 1  # no task is damaged
    store = Store.open(str(copied_store))
    tasks = list_tasks([str(corpus_folder / "*.tar")])
    assert list_missing(store, *store.list_layers(), tasks, damage=[damage]) == []
    assert verify(copied_store).damage == []


def run_verify(tmp_path, *arguments):
    metrics = str(tmp_path / "metrics.jsonl")
    return CliRunner().invoke(app, ["verify", *map(str, arguments), "--metrics", metrics])


def test_the_command_exits_0_on_a_sound_store(tmp_path, store_folder):
    result = run_verify(tmp_path, store_folder)
    assert result.exit_code == 0
    assert re.search(r"verified 6 commits, \d+ files, [\d.]+ MB: no damage", result.stdout)


def test_the_command_exits_1_names_the_damage_and_writes_the_report(
    tmp_path, copied_store, commits
):
    path = f"{commits['latents'].data_folder}/{SHARD}"
    flip(copied_store / path, 3)
    before = sorted(p for p in copied_store.rglob("*"))
    result = run_verify(tmp_path, copied_store, "--report", tmp_path / "r.json")
    assert result.exit_code == 1
    assert f"damaged {path}: expected SHA-256" in result.stdout
    assert (
        f"To encode them anew: the command that encoded them with --repair {tmp_path}/r.json"
        in (result.stdout)
    )
    assert [d.path for d in read_damage(tmp_path / "r.json")] == [path]
    assert sorted(p for p in copied_store.rglob("*")) == before
    as_json = run_verify(tmp_path, copied_store, "--json")
    assert as_json.exit_code == 1
    plain = json.loads(as_json.stdout)
    assert plain["num_commits"] == 6
    assert [d["path"] for d in plain["damage"]] == [path]


def test_the_command_exits_1_where_a_spec_is_damaged_and_2_where_there_is_no_store(
    tmp_path, copied_store, commits
):
    (copied_store / commits["latents"].layer / "spec.json").write_text("{}")
    damaged = run_verify(tmp_path, copied_store)
    assert (damaged.exit_code, "spec.json" in damaged.stderr) == (1, True)
    assert run_verify(tmp_path, tmp_path / "none").exit_code == 2


def test_a_store_that_goes_away_meanwhile_is_missing_and_not_damaged(copied_store):
    checks = verify_store(Store.open(str(copied_store)), num_threads=1)
    assert not next(checks).damage
    copied_store.rename(copied_store.with_name("away"))
    with pytest.raises(MissingStoreError, match="expected a store, found no layer there: nothing"):
        list(checks)
