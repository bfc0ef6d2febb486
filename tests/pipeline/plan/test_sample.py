"""Looking into a corpus: what is counted, what is chosen, what is written for the timing."""

import io
import json
import os
import tarfile

import numpy as np
import pytest

from pipeline.corpus.members import group_members
from pipeline.corpus.source import open_source
from pipeline.corpus.tar import list_members
from pipeline.corpus.tasks import CorpusError, Task, list_tasks, split_tasks
from pipeline.plan.sample import (
    MAX_READ_BYTES,
    choose_tasks,
    count_bytes,
    count_offered,
    sample_corpus,
    survey_tar,
    write_tar,
)
from pipeline.spec.fields import LatentsSpec
from tests.support.decode_here import Sample, build_views, decode_sample
from tests.support.web_tars import KINDS, WebTar, draw, draw_mask

SPEC = LatentsSpec(model="m")


def read_samples(path):
    (task,) = list_tasks([str(path)])
    with open_source(task) as (file, _):
        groups, rejects, _ = group_members(list_members(file, num_bytes=task.num_bytes))
        return [decode_sample(file, group) for group in groups], rejects


def make_tasks(*sizes):
    return [Task(f"t{i}", f"file:///t{i}.tar", size) for i, size in enumerate(sizes)]


def write_members(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_survey_counts_a_whole_tar_and_reads_the_samples_asked_for(corpus_folder):
    tasks = list_tasks([str(corpus_folder / "*train-00000.tar")])
    decoded, _ = read_samples(corpus_folder / "scenes-train-00000.tar")
    survey, samples = survey_tar(tasks[0], SPEC, num_samples=2, start=0.5)
    assert survey.num_samples == len(decoded) == 4
    assert sorted(survey.phrases.elements()) == sorted(p for s in decoded for p in s.phrases)
    assert len(samples) == 2
    assert survey.fault == ""


def test_a_survey_counts_what_names_and_texts_reject(tmp_path):
    mask = b"not looked at"
    write_members(
        tmp_path / "a.tar",
        [
            ("good.jpg", b"x"),
            ("good.json", b'{"phrases": ["cat"]}'),
            ("good.mask0.png", mask),
            ("bad.jpg", b"x"),
            ("bad.json", b"{"),
            ("bad.mask0.png", mask),
            ("few.jpg", b"x"),
            ("few.json", b'{"phrases": ["cat", "dog"]}'),
            ("few.mask0.png", mask),
            ("alone.jpg", b"x"),
            ("notes.txt", b"x"),
        ],
    )
    (task,) = list_tasks([str(tmp_path / "a.tar")])
    survey, samples = survey_tar(task, SPEC, num_samples=9, start=0)
    assert survey.num_samples == len(samples) == 2
    assert survey.phrases == {"cat": 1}
    assert survey.offered["plain"] == 1  # of an image alone
    assert survey.rejects == {
        "bad_text": 1,
        "missing_mask": 1,
        "unexpected_member": 1,
    }


def test_parts_of_a_tar_add_up_to_it(corpus_folder):
    (task,) = list_tasks([str(corpus_folder / "*train-00000.tar")])
    parts = split_tasks([task], task.num_bytes // 2)
    surveys = [survey_tar(part, SPEC, num_samples=1, start=0)[0] for part in parts]
    whole, _ = survey_tar(task, SPEC, num_samples=1, start=0)
    assert len(parts) > 1
    assert sum((survey.phrases for survey in surveys), whole.phrases - whole.phrases) == (
        whole.phrases
    )
    assert sum(count_bytes(part) for part in parts) == pytest.approx(task.num_bytes)


def test_a_damaged_tar_is_a_survey_with_its_fault(tmp_path, corpus_folder):
    data = (corpus_folder / "scenes-train-00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    (task,) = list_tasks([str(tmp_path / "cut.tar")])
    survey, samples = survey_tar(task, SPEC, num_samples=2, start=0)
    assert "cut.tar" in survey.fault
    assert not samples
    with pytest.raises(CorpusError, match=r"none of the 1 tars .*cut\.tar"):
        sample_corpus([task], SPEC, num_samples=2, seed=0)


def test_what_is_no_tar_is_a_survey_with_its_fault(tmp_path, corpus_folder):
    (tmp_path / "a.tar").symlink_to(corpus_folder / "scenes-train-00000.tar")
    os.mkfifo(tmp_path / "b.tar")  # to open it would wait for ever
    tasks = list_tasks([str(tmp_path / "*.tar")])
    surveys, samples = sample_corpus(tasks, SPEC, num_samples=4, seed=0)
    assert [survey.fault for survey in surveys if survey.fault] == [tasks[1].fault]
    assert len(samples) == 2


def test_tars_are_chosen_of_every_size():
    tasks = make_tasks(*range(1, 321))
    chosen = choose_tasks(tasks, np.random.default_rng(0))
    assert len(chosen) == 16
    assert [(task.num_bytes - 1) // 20 for task, _ in chosen] == list(range(16))
    assert {stands_for for _, stands_for in chosen} == {20}
    uneven = choose_tasks(make_tasks(*range(1, 21)), np.random.default_rng(0))
    assert [stands_for for _, stands_for in uneven] == [2] * 4 + [1] * 12


def test_large_tars_are_few():
    tasks = make_tasks(*[MAX_READ_BYTES // 3] * 50)
    assert len(choose_tasks(tasks, np.random.default_rng(0))) == 3
    assert len(choose_tasks(make_tasks(*[MAX_READ_BYTES] * 50), np.random.default_rng(0))) == 2


def test_a_seed_chooses_the_same_again(corpus_folder):
    tasks = list_tasks([str(corpus_folder / "*.tar")])
    (_, first), (_, again), (_, other) = (
        sample_corpus(tasks, SPEC, num_samples=5, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert len(first) == 5
    assert first != other


def test_a_written_tar_decodes_to_the_same_images_with_other_phrases(tmp_path, corpus_folder):
    tasks = list_tasks([str(corpus_folder / "*.tar")])
    _, samples = sample_corpus(tasks, SPEC, num_samples=12, seed=0)
    write_tar(tmp_path / "some.tar", samples, phrases_end=" again")
    found, rejects = read_samples(tmp_path / "some.tar")
    assert not rejects
    assert all(isinstance(sample, Sample) for sample in found)
    originals = {}
    for path in corpus_folder.glob("*.tar"):
        originals |= {s.image_sha256: s for s in read_samples(path)[0]}
    assert len(found) == len({s.image_sha256 for s in found}) == 12
    for sample_found, members in zip(found, samples, strict=True):
        original = originals[sample_found.image_sha256]
        assert sample_found.phrases == tuple(f"{phrase} again" for phrase in original.phrases)
        assert members.text.phrases == original.phrases


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("crop", "views"), [("center", 1), ("resize", 1), ("phrase", 3)])
def test_what_is_offered_is_what_the_views_of_a_sample_have(crop, views, flip, tmp_path):
    tar, sample = WebTar(), {"phrases": ["dog", "cat"], "negatives": ["cow"]}
    mask = draw_mask()
    masks = {"mask0.png": mask, "mask1.png": mask, "ignore.png": mask}
    tar.add("a", draw(0), None, {"json": json.dumps(sample).encode(), **masks})
    tar.add("b", draw(1), None, {"json": json.dumps(sample).encode(), "ignore.png": mask})
    tar.add("c", draw(2), None, {"txt": b"a boat"})
    tar.add("d", draw(3), None, {})
    tar.add("e", draw(4), None, {"json": b'{"phrases": [], "negatives": ["ship"]}'})
    (task,) = list_tasks([str(tar.write(tmp_path / "a.tar"))])
    spec = LatentsSpec(model="m", size=64, crop=crop, views=views, flip=flip, negatives=2)
    survey, samples = survey_tar(task, spec, num_samples=9, start=0)
    with open_source(task) as (file, _):
        for members, text, _ in samples:
            found, rejects = build_views(decode_sample(file, members, spec=spec), spec)
            assert not rejects
            pairs = [pair for view in found for pair in view.pairs]
            offered = count_offered(text, members, spec)
            assert offered["views"] == len(found)
            assert offered["masks"] == sum(pair.mask is not None for pair in pairs)
            assert offered["plain"] == sum(pair.mask is None for pair in pairs)
            assert offered["negatives"] == sum(pair.negative for pair in pairs)
            assert offered["ignores"] == sum(view.ignore is not None for view in found)
    # Of "dog", "cat" and "a boat" an image has one or two; d and e, without phrases, draw none.
    of_a = (1 + flip) * (2 * views if crop == "phrase" else 1)
    assert survey.offered["drawn"] == of_a * 1 + (1 + flip) * (1 + 2)
    assert survey.num_set_aside == 0


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_web_tar_is_surveyed_and_written_again(name, tmp_path):
    web = KINDS[name]()
    (task,) = list_tasks([str(web.write(tmp_path / "web.tar"))])
    spec = LatentsSpec(model="m", keep_json=("uid", "caption"))
    survey, samples = survey_tar(task, spec, num_samples=99, start=0)
    captions = [caption for _, caption in web.samples.values()]
    assert survey.num_set_aside == web.num_set_aside
    assert survey.phrases.total() == sum(caption is not None for caption in captions)
    assert survey.offered["plain"] == survey.num_samples == len(captions)
    write_tar(tmp_path / "again.tar", samples, phrases_end=" again")
    found, rejects = read_samples(tmp_path / "again.tar")
    assert not rejects
    endings = [(caption[:994] + " again",) if caption else () for caption in captions]
    assert [sample.phrases for sample in found] == endings
