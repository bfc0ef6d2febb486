"""Which samples of a tar are a part's, and that all its parts are of one version of it."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest

from pipeline.corpus.members import Reject, RejectReason, SampleMembers
from pipeline.corpus.parts import pin_path, pin_source, read_pin, select_part
from pipeline.corpus.source import SourceChangedError
from pipeline.corpus.tar import Member
from pipeline.corpus.tasks import Task, split_tasks
from pipeline.storage.open import open_storage
from pipeline.store.commit import Commit, DamagedStoreError, SourceTar, new_attempt, write_commit
from pipeline.store.task_ids import list_part_ids, parse_part_id


def make_samples(*sizes):
    members = [Member(f"{i}.jpg", "file", 0, size) for i, size in enumerate(sizes)]
    return [SampleMembers(m.name[:-4], m, Member("t", "file", 0, 0), ()) for m in members]


def keys(groups, num_parts):
    parts = [select_part(groups, [], part=i, num_parts=num_parts)[0] for i in range(num_parts)]
    return ["".join(sample.key for sample in part) for part in parts]


@pytest.mark.parametrize(
    ("sizes", "num_parts", "expected"),
    [
        ((10, 10, 10, 10, 10, 10), 3, ["01", "23", "45"]),
        ((10, 10, 10, 10), 1, ["0123"]),
        ((90_000, 10_000, 10_000, 10_000, 60_000), 2, ["0", "1234"]),  # by bytes, not by count
        ((10, 10), 5, ["", "0", "", "1", ""]),
        ((), 2, ["", ""]),
        ((0, 0, 0, 0), 2, ["01", "23"]),  # headers are bytes too
    ],
)
def test_a_range_of_samples_balanced_by_bytes(sizes, num_parts, expected):
    assert keys(make_samples(*sizes), num_parts) == expected


def test_what_grouping_rejected_is_of_the_first_part():
    rejects = [
        Reject("a", "sample", RejectReason.BAD_TEXT, ""),
        Reject("b", "member", RejectReason.NOT_A_FILE, ""),
    ]
    found = [select_part(make_samples(1, 1), rejects, part=i, num_parts=2)[1] for i in range(2)]
    assert found == [rejects, []]


@pytest.mark.parametrize(("part", "num_parts"), [(-1, 3), (3, 3), (0, 0)])
def test_a_part_that_is_none_is_an_error(part, num_parts):
    with pytest.raises(ValueError, match=rf"part: expected 0 to {num_parts - 1}, got {part}"):
        select_part(make_samples(1), [], part=part, num_parts=num_parts)


LAYER = "latents-0123456789abcdef"
TAR = Task("scenes-01234567", "file:///corpus/scenes.tar", 1024)
PARTS = split_tasks([TAR], 256)
FIRST, OTHER = "a" * 64, "b" * 64


def test_a_parts_id_is_read_back():
    ids = [part.id for part in PARTS]
    assert ids == list_part_ids(TAR.id, 4)
    assert [parse_part_id(part_id) for part_id in ids] == [(TAR.id, i, 4) for i in range(4)]
    large = list_part_ids(TAR.id, 12_345)[-1]
    assert parse_part_id(large) == (TAR.id, 12_344, 12_345)
    ends = ("", "-p0004of0004", "-p00001of0004", "-p0000of0001", "-p0000of0004-p", "-p٠٠٠٠of0004")
    assert [parse_part_id(TAR.id + end) for end in ends] == [None] * 6
    assert list_part_ids(TAR.id, 1) == [TAR.id]


@pytest.fixture
def storage(tmp_path):
    return open_storage(str(tmp_path / "store"))


def commit_part(storage, part, sha256, generation=0):
    commit = Commit(
        layer=LAYER,
        task=part.id,
        generation=generation,
        attempt=new_attempt(generation),
        rows={"pairs": 0, "views": 0, "prompts": 0},
        pairs_sha256="",
        source=SourceTar(url=TAR.url, num_bytes=1024, sha256=sha256, head_sha256=""),
        files=(),
    )
    write_commit(storage, commit)
    return storage.root / commit.name


def test_the_first_part_pins_the_tar_and_the_others_are_held_to_it(storage):
    assert read_pin(storage, LAYER, TAR.id) is None
    for part in (*PARTS, PARTS[0]):
        pin_source(storage, LAYER, part, FIRST)
    path = storage.root / LAYER / "sources" / f"{TAR.id}.json"
    assert json.loads(path.read_text()) == {"sha256": FIRST, "num_bytes": 1024}
    before = path.read_bytes()
    for part in PARTS:
        with pytest.raises(SourceChangedError, match=f"{FIRST} of 1024 .*, got SHA-256 {OTHER}"):
            pin_source(storage, LAYER, part, OTHER)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_error_says_what_may_be_done(storage):
    pin_source(storage, LAYER, PARTS[0], FIRST)
    path = pin_path(LAYER, TAR.id)
    with pytest.raises(SourceChangedError, match=f"no part is committed yet: .* remove {path} "):
        pin_source(storage, LAYER, PARTS[1], OTHER)
    commit_part(storage, PARTS[2], FIRST)
    with pytest.raises(SourceChangedError, match=f"{PARTS[2].id} is committed: bring that tar ba"):
        pin_source(storage, LAYER, PARTS[1], OTHER)


def test_a_tar_rewritten_on_purpose_is_encoded_after_the_pins_removal(storage):
    pin_source(storage, LAYER, PARTS[0], FIRST)
    storage.remove_tree(pin_path(LAYER, TAR.id))
    pin_source(storage, LAYER, PARTS[1], OTHER)
    assert read_pin(storage, LAYER, TAR.id).sha256 == OTHER


def test_a_pin_that_was_lost_is_made_from_a_committed_part(storage):
    """Also by a writer with another version, which would otherwise pin that."""
    commit_part(storage, PARTS[1], OTHER).write_text("{")  # reported by verify
    commit_part(storage, PARTS[2], FIRST)
    with pytest.raises(SourceChangedError, match=f"{FIRST} of 1024 .*, got SHA-256 {OTHER}"):
        pin_source(storage, LAYER, PARTS[0], OTHER)
    pin_source(storage, LAYER, PARTS[0], FIRST)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"sha256": "x", "num_bytes": 1024}', f'{{"sha256": "{FIRST}"}}',
        f'{{"sha256": "{FIRST}", "num_bytes": 1024, "more": 1}}', "\0",
    ],
)  # fmt: skip
def test_a_pin_that_cannot_be_read_is_damage(storage, text):
    storage.create(pin_path(LAYER, TAR.id), text.encode())
    with pytest.raises(DamagedStoreError, match=rf"sources/{TAR.id}\.json: .*; remove that file"):
        pin_source(storage, LAYER, PARTS[0], FIRST)


def test_another_size_is_another_version(storage):
    pin_source(storage, LAYER, replace(PARTS[0], num_bytes=1025), FIRST)
    with pytest.raises(SourceChangedError, match=r"of 1025 bytes .* of 1024 bytes"):
        pin_source(storage, LAYER, PARTS[1], FIRST)


def test_of_two_processes_with_two_versions_one_pins_its_own_and_the_others_parts_all_fail(
    tmp_path,
):
    """Every part of many tars by each of two processes, which start each tar together."""
    num_tars, context = 12, multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(2, mp_context=context) as pool:
        together = manager.Barrier(2)
        url = str(tmp_path / "store")
        runs = [pool.submit(pin_many, url, sha, num_tars, together) for sha in (FIRST, OTHER)]
        taken = [run.result(timeout=120) for run in runs]
    for ours, theirs in zip(*taken, strict=True):
        assert sorted((ours, theirs)) == [0, len(PARTS)]


def pin_many(url, sha256, num_tars, together):
    """How many parts of each tar were held to this process's version."""
    storage, taken = open_storage(url), []
    for tar in range(num_tars):
        parts = split_tasks([replace(TAR, id=f"{tar}-01234567")], 256)
        together.wait(60)
        taken.append(0)
        for part in parts:
            with suppress(SourceChangedError):
                pin_source(storage, LAYER, part, sha256)
                taken[-1] += 1
    return taken
