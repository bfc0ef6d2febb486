"""Which records are read: of retired, renewed and half-renewed tasks, in parts and over latents."""

import json

import pytest

from pipeline.bench.store import make_layer
from pipeline.spec.fields import FeaturesSpec, LatentsSpec
from pipeline.store.commit import (
    Commit,
    NewerRecordError,
    RecordName,
    SourceTar,
    new_attempt,
    write_commit,
)
from pipeline.store.current import find_repairs, list_current, list_layers_current, list_over
from pipeline.store.store import Store

LATENTS = make_layer(LatentsSpec(model="none", size=64), scaling_factor=1.0)
FEATURES = make_layer(FeaturesSpec(blocks=(6,)), latents=LATENTS.fingerprint)
ROWS = dict.fromkeys(("pairs", "views", "prompts", "masks", "ignores"), 1)
FIRST_ROWS = dict.fromkeys(("pairs", "views", "prompts"), 1)
PARTS = tuple(f"long-0123456789ab-p000{part}of0003" for part in range(3))


@pytest.fixture
def store(tmp_path):
    store = Store.open(str(tmp_path / "store"))
    for layer in (LATENTS, FEATURES):
        store.add_layer(layer)
    return store


def write(store, task, content, generation, *, layer=LATENTS, version=2, **fields):
    """Write a record of a content, a letter; of features one over that content."""
    sha256 = content * 64
    fields = {"rows": ROWS if version == 2 else FIRST_ROWS, "files": (), **fields}
    if layer is LATENTS:
        source = {"num_bytes": 1, "sha256": sha256, "head_sha256": sha256}
        fields["source"] = SourceTar(url=f"file:///c/{task}.tar", **source)
    elif version == 2:
        fields["source_sha256"] = sha256
    commit = Commit(
        schema_version=version,
        layer=layer.folder,
        task=task,
        generation=generation,
        attempt=new_attempt(generation),
        # Phrases are equal: contents are not told by them.
        **({"pairs_sha256": "0" * 64} | fields),
    )
    assert write_commit(store.storage, commit) == "won"
    return commit


def restate(store, commit, *statuses):
    """Write the records of a task that come after one, by their status."""
    for status in statuses:
        commit = commit.restate(status, generation=commit.generation + 1)
        assert write_commit(store.storage, commit) == "won"
    return commit


def damage(store, commit):
    store.storage.local_path(commit.name).write_text("{")


def list_read(store):
    """Task → generation of the latents, and of the features over them."""
    latents = list_current(store, LATENTS.folder)
    features = list_over(store, FEATURES.folder, LATENTS.folder, latents.current)
    return tuple(
        {task: record.generation for task, record in found.current.items()}
        for found in (latents, features)
    )


def test_the_newest_content_and_the_features_of_it(store):
    write(store, "a", "a", 0)
    write(store, "a", "a", 0, layer=FEATURES)
    assert list_read(store) == ({"a": 0}, {"a": 0})
    write(store, "a", "a", 1)  # a repair has the same content
    assert list_read(store) == ({"a": 1}, {"a": 0})
    write(store, "a", "b", 2, content_since=2)
    assert list_read(store) == ({"a": 2}, {})
    write(store, "a", "b", 1, layer=FEATURES, latents_generation=2)
    assert list_read(store) == ({"a": 2}, {"a": 1})
    write(store, "a", "a", 3, content_since=3)  # the first content again
    assert list_read(store) == ({"a": 3}, {"a": 0})


def test_features_of_version_1_go_by_the_generation_that_they_name(store):
    """They name no SHA-256 of their source."""
    write(store, "a", "a", 0, version=1)
    write(store, "a", "a", 0, layer=FEATURES, version=1, latents_generation=0)
    write(store, "a", "a", 1, content_since=0)
    assert list_read(store) == ({"a": 1}, {"a": 0})
    write(store, "a", "b", 2, content_since=2)
    assert list_read(store) == ({"a": 2}, {})


@pytest.mark.parametrize(
    ("renewed", "read"),
    [
        ((0,), (0, 0, 0)),  # while fewer parts are renewed the old content is read
        ((1, 2), (0, 0, 0)),  # which is whole
        ((0, 1, 2), (1, 1, 1)),
    ],
)
def test_a_half_renewed_tar_is_read_in_one_content(store, renewed, read):
    for part in PARTS:
        write(store, part, "a", 0)
        write(store, part, "a", 0, layer=FEATURES)
    for number in renewed:
        write(store, PARTS[number], "b", 1, content_since=1)
    latents, features = list_read(store)
    assert latents == dict(zip(PARTS, read, strict=True))
    assert features == ({} if read[0] else latents)


def test_where_no_content_is_whole_the_one_of_most_parts_is_read(store):
    write(store, PARTS[0], "a", 0)
    for part in PARTS[1:]:
        write(store, part, "b", 0)
    write(store, PARTS[2], "a", 1, content_since=1)
    assert list_read(store)[0] == {PARTS[0]: 0, PARTS[2]: 1}  # of two the later


def test_a_repair_of_a_part_is_of_its_content(store):
    for part in PARTS:
        write(store, part, "a", 0)
    write(store, PARTS[1], "a", 1)
    assert list_read(store)[0] == {PARTS[0]: 0, PARTS[1]: 1, PARTS[2]: 0}


@pytest.mark.parametrize(
    ("statuses", "is_retired", "is_read"),
    [
        (("retired",), True, False),
        (("retired", "removed"), True, False),
        (("retired", "stored"), False, True),
        (("retired", "removed", "vacant"), False, False),
    ],
)
def test_what_a_status_means(store, statuses, is_retired, is_read):
    latents = write(store, "a", "a", 0)
    features = write(store, "a", "a", 0, layer=FEATURES)
    write(store, "b", "b", 0)
    for commit in (latents, features):
        restate(store, commit, *statuses)
    found = list_layers_current(store, [FEATURES, LATENTS])
    for layer in (LATENTS, FEATURES):
        assert ("a" in found[layer.folder].current) == is_read
        assert found[layer.folder].retired == ({"a"} if is_retired else set())
        assert found[layer.folder].newest["a"].generation == len(statuses)
    assert "b" in found[LATENTS.folder].current


def test_retired_features_are_not_read_over_latents_that_are_back(store):
    """A kill between the two: the features' older record agrees, and its files may be gone."""
    latents = write(store, "a", "a", 0)
    features = write(store, "a", "a", 0, layer=FEATURES)
    restate(store, latents, "retired", "stored")
    restate(store, features, "retired", "removed")
    assert list_read(store) == ({"a": 2}, {})


def test_what_gc_has_removed_is_never_read_again(store):
    """Not for being of the content of most parts, nor of that of the latents."""
    for part in PARTS:
        restate(store, write(store, part, "a", 0), "retired", "removed", "vacant")
        features = write(store, part, "a", 0, layer=FEATURES)
        restate(store, features, "retired", "removed", "vacant")
    write(store, PARTS[0], "a", 4)
    for part in PARTS[1:]:
        write(store, part, "b", 4, content_since=4)
        write(store, part, "c", 4, layer=FEATURES)
    assert list_read(store) == ({PARTS[1]: 4, PARTS[2]: 4}, {})


def test_a_record_that_cannot_be_read_is_found_by_reading_it(store):
    write(store, "a", "a", 0)
    damage(store, write(store, "a", "a", 1))
    damage(store, write(store, "a", "a", 0, layer=FEATURES))
    assert list_read(store) == ({"a": 1}, {"a": 0})


def test_features_whose_older_record_cannot_be_read_are_read(store):
    write(store, "a", "a", 0)
    damage(store, write(store, "a", "a", 0, layer=FEATURES))
    write(store, "a", "a", 1, layer=FEATURES)
    assert list_read(store) == ({"a": 0}, {"a": 1})


def test_a_newer_ldznets_record_is_said_to_be_one(store):
    write(store, "a", "a", 0)
    later = write(store, "a", "a", 1)
    path = store.storage.local_path(later.name)
    plain = {**json.loads(path.read_text()), "schema_version": 3}
    del plain["record_sha256"]
    path.write_text(json.dumps(plain))
    with pytest.raises(NewerRecordError, match="was written by a newer ldznet"):
        list_current(store, LATENTS.folder)


def test_one_record_a_task_is_told_by_the_listing_alone(store, monkeypatch):
    """A store that was never repaired costs no read of a record."""
    for task in "abc":
        write(store, task, task, 0)
        write(store, task, task, 0, layer=FEATURES)
    monkeypatch.setattr(type(store.storage), "read", None)
    assert list_read(store) == ({"a": 0, "b": 0, "c": 0},) * 2
    assert list_current(store, LATENTS.folder).newest["a"] == RecordName("a", 0)


def list_repairs(store):
    """(layer's kind, task) → generation of what is read for the pinned generation 0."""
    pinned = {
        layer.folder: [RecordName(task, 0) for task in ("a", "b")] for layer in (LATENTS, FEATURES)
    }
    return {
        (layer.partition("-")[0], record.task): repair.generation
        for layer, found in find_repairs(store, pinned).items()
        for record, repair in found.items()
    }


def write_pinned(store):
    """Two tasks of content a, both layers."""
    return {
        (layer.kind, task): write(store, task, "a", 0, layer=layer)
        for layer in (LATENTS, FEATURES)
        for task in ("a", "b")
    }


def test_a_repair_is_the_newest_generation_of_the_pinned_content(store):
    write_pinned(store)
    assert list_repairs(store) == {}
    write(store, "a", "a", 1)
    write(store, "b", "a", 1, layer=FEATURES)
    assert list_repairs(store) == {("latents", "a"): 1, ("features", "b"): 1}
    write(store, "a", "a", 2)  # of the repair
    write(store, "a", "b", 3, content_since=3)  # and a renewal, of equal phrases
    write(store, "b", "b", 1, content_since=1)
    assert list_repairs(store) == {("latents", "a"): 2, ("features", "b"): 1}


def test_a_repair_of_other_pairs_is_none(store):
    write_pinned(store)
    write(store, "a", "a", 1, pairs_sha256="1" * 64)
    assert list_repairs(store) == {}


def test_a_repair_that_was_retired_or_removed_since(store):
    write_pinned(store)
    restate(store, write(store, "a", "a", 1), "retired")
    assert list_repairs(store) == {("latents", "a"): 1}  # a snapshot keeps a retired task's files
    restate(store, write(store, "b", "a", 1), "retired", "removed", "vacant")
    assert list_repairs(store) == {("latents", "a"): 1}
    write(store, "b", "a", 5)
    assert list_repairs(store) == {("latents", "a"): 1, ("latents", "b"): 5}


def test_a_record_of_version_1_that_tells_no_source_stays_pinned(store):
    for layer in (LATENTS, FEATURES):
        write(store, "a", "a", 0, layer=layer, version=1)
        write(store, "a", "a", 1, layer=layer)
    assert list_repairs(store) == {("latents", "a"): 1}  # version 1 of latents tells it


@pytest.mark.parametrize("kind", ["latents", "features"])
def test_of_a_pinned_record_that_cannot_be_read_the_other_layer_tells_the_content(store, kind):
    pinned = write_pinned(store)
    layer = LATENTS if kind == "latents" else FEATURES
    damage(store, pinned[kind, "a"])
    write(store, "a", "b", 1, layer=layer)
    assert list_repairs(store) == {}
    write(store, "a", "a", 2, layer=layer)
    assert list_repairs(store) == {(kind, "a"): 2}
