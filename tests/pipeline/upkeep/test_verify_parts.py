"""Verification of a long tar's parts: all are of one version of the tar, the one that is pinned."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from pipeline.corpus.parts import pin_path, pin_source
from pipeline.corpus.tasks import Task
from pipeline.store.store import Store
from pipeline.upkeep.verify import verify_store


def verify(folder):
    return [damage for check in verify_store(Store.open(str(folder))) for damage in check.damage]


def edit(path, **changes):
    """Change keys of a JSON file; a dict is merged into the one there."""
    plain = json.loads(path.read_text())
    for key, value in changes.items():
        plain[key] = plain[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(plain))


@pytest.fixture
def parts(copied_store):
    """The store as if a tar had been encoded in three parts: records alone, and their pin."""
    store, records = Store.open(str(copied_store)), []
    latents, features = store.list_layers()
    shutil.rmtree(copied_store / features.folder)
    commit = next(iter(store.newest_commits(latents.folder).values()))
    for i in range(3):
        part = commit.model_copy(update={"task": f"{commit.task}-p000{i}of0003"})
        files = [{**f.model_dump(), "path": f.path.replace(commit.task, part.task)}
                 for f in commit.files]  # fmt: skip
        shutil.copytree(copied_store / commit.data_folder, copied_store / part.data_folder)
        records.append(copied_store / part.name)
        records[-1].write_text(part.model_copy(update={"files": files}).model_dump_json())
    (copied_store / commit.name).unlink()
    task = replace(
        Task(commit.task, "", commit.source.num_bytes), id=f"{commit.task}-p0000of0003", num_parts=3
    )
    pin_source(store.storage, commit.layer, task, commit.source.sha256)
    return records, copied_store / pin_path(commit.layer, commit.task)


def test_parts_and_their_pin_agree(copied_store, parts):
    assert verify(copied_store) == []


@pytest.mark.parametrize("without_pin", [False, True])
@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"num_bytes": 1}])
def test_a_part_of_another_version_of_its_tar_is_named(copied_store, parts, change, without_pin):
    records, pin = parts
    edit(records[1], source=change)
    expected = [str(records[1].relative_to(copied_store))]
    by = pin if not without_pin else records[0]
    if without_pin:
        pin.unlink()
        expected.insert(0, str(pin.relative_to(copied_store)))
    damage = sorted(verify(copied_store), key=lambda d: d.task)
    assert [d.path for d in damage] == expected
    assert re.search(rf"but {by.relative_to(copied_store)} says .*two versions", damage[-1].what)


def test_a_pin_of_another_version_than_all_parts_is_named_by_each(copied_store, parts):
    records, pin = parts
    edit(pin, sha256="0" * 64)
    damage = verify(copied_store)
    assert sorted(d.path for d in damage) == [str(r.relative_to(copied_store)) for r in records]
    assert all("where a pin differs from all parts alike, remove it" in d.what for d in damage)


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda pin: pin.unlink(), "^missing; repairing this task makes it"),
        (lambda pin: pin.write_text("{"), "remove that file and run encode again"),
        (lambda pin: (pin.unlink(), pin.mkdir()), "directory"),
    ],
)
def test_a_damaged_pin_is_named_once_of_the_first_part_there(copied_store, parts, harm, what):
    records, pin = parts
    records[0].unlink()
    harm(pin)
    (found,) = verify(copied_store)
    assert found.path == str(pin.relative_to(copied_store))
    assert found.task.endswith("-p0001of0003")
    assert re.search(what, found.what)


def test_parts_without_a_pin_whose_first_record_is_damaged(copied_store, parts):
    """Nothing tells what the others are to be held to; the record is named, and nothing else."""
    records, pin = parts
    pin.unlink()
    records[0].write_text("{")
    (found,) = verify(copied_store)
    assert found.path == str(records[0].relative_to(copied_store))
