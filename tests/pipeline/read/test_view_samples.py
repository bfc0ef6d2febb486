"""Samples: a pair, or a phrase of an image of which an epoch reads one stored view."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from pipeline.encode.prepare import prepare_encode
from pipeline.read.choice import PairChoice
from pipeline.read.reader import PairReader
from pipeline.read.source import open_layers
from pipeline.read.view_samples import ViewGroups, ViewSamples, group_views
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.store import Store

LATENT = frozenset({"latent"})


@pytest.fixture(scope="module")
def source(tmp_path_factory, corpus_folder, spec):
    """A store of two random squares a phrase, each of them also mirrored, in three tasks."""
    folder = tmp_path_factory.mktemp("views") / "store"
    latents = spec.latents.model_copy(
        update={"crop": "phrase", "views": 2, "flip": True, "keep_image": False}
    )
    views = spec.model_copy(update={"latents": latents, "features": None})
    run = prepare_encode(views, [str(corpus_folder / "*.tar")], str(folder), batch=8)
    stage = EncodeStage(run.config)
    assert {stage.encode(item).status for item in run.items} == {"committed"}
    return open_layers(str(folder), reads_features=False)


def texts(reader, numbers):
    """(task, key, phrase) of pairs."""
    index = reader.index.select(["key", "phrase"]).to_pylist()
    tasks = np.searchsorted(reader.task_starts, numbers, side="right") - 1
    return [
        (int(task), index[n]["key"], index[n]["phrase"])
        for task, n in zip(tasks, numbers, strict=True)
    ]


def test_an_epoch_reads_one_view_of_each_phrase(source):
    reader = PairReader(source, tasks="*", inputs=LATENT, views="one")
    num_views = Counter(texts(reader, np.arange(len(reader))))
    assert set(num_views.values()) == {4}
    picked = reader.choose_pairs(np.arange(reader.num_samples), seed=0, epoch=0)
    assert sorted(texts(reader, picked)) == sorted(num_views)
    assert reader.num_samples == len(num_views) < len(reader)
    assert (picked.dtype, reader.sample_starts.dtype) == (np.int64, np.int64)
    for task, (first, last) in enumerate(
        zip(reader.sample_starts, reader.sample_starts[1:], strict=False)
    ):
        assert {text[0] for text in texts(reader, picked[first:last])} == {task}
    batch = reader.read(picked[:3], draws=[0] * 3)
    assert [*zip(batch.keys, batch.phrases, strict=True)] == [
        text[1:] for text in texts(reader, picked[:3])
    ]


def test_the_view_is_drawn_from_seed_epoch_and_sample_alone(source):
    """Not from who asks, in which order, nor from the tasks beside: and every view comes."""
    reader = PairReader(source, tasks="*", inputs=LATENT, views="one")
    samples = np.arange(reader.num_samples)
    whole = reader.choose_pairs(samples, seed=5, epoch=2)
    some = np.array([7, 0, 7, len(samples) - 1])
    assert reader.choose_pairs(some, seed=5, epoch=2).tolist() == whole[some].tolist()
    assert reader.choose_pairs(samples, seed=5, epoch=3).tolist() != whole.tolist()
    assert reader.choose_pairs(samples, seed=6, epoch=2).tolist() != whole.tolist()
    alone = PairReader(source, tasks="*val*", inputs=LATENT, views="one")
    task = next(n for n, name in enumerate(reader.tasks) if "val" in name)
    part = slice(*reader.sample_starts[task : task + 2])
    there = alone.choose_pairs(np.arange(alone.num_samples), seed=5, epoch=2)
    assert there.tolist() == (whole[part] - reader.task_starts[task]).tolist()
    epochs = np.array([reader.choose_pairs(samples, seed=0, epoch=epoch) for epoch in range(64)])
    counts = np.array([len(set(epochs[:, sample].tolist())) for sample in samples])
    assert counts.min() == 4
    first = np.array([min(set(epochs[:, sample].tolist())) for sample in samples])
    assert (epochs == first).mean() == pytest.approx(0.25, abs=0.04)


def test_pairs_that_a_choice_leaves_out_are_not_drawn(source):
    everything = PairReader(source, tasks="*", inputs=LATENT)
    limit = float(np.quantile(everything.index["mask_area"].to_numpy(), 0.6))
    reader = PairReader(
        source, tasks="*", inputs=LATENT, views="one", choice=PairChoice(min_area=limit)
    )
    num_views = Counter(texts(reader, np.arange(len(reader))))
    assert 0 < reader.num_samples < everything.num_samples // 4
    for epoch in range(3):
        picked = reader.choose_pairs(np.arange(reader.num_samples), seed=0, epoch=epoch)
        assert sorted(texts(reader, picked)) == sorted(num_views)


def test_every_view_is_a_sample_by_default_and_no_index_is_read(source, monkeypatch):
    monkeypatch.delattr(Store, "read_index")
    reader = PairReader(source, tasks="*", inputs=LATENT)
    assert reader.num_samples == len(reader)
    assert reader.sample_starts.tolist() == reader.task_starts.tolist()
    samples = np.array([3, 1, 3])
    picked = reader.choose_pairs(samples, seed=1, epoch=4)
    assert picked.tolist() == [3, 1, 3]
    picked[0] = 0
    assert samples[0] == 3
    with pytest.raises(AttributeError, match="read_index"):
        PairReader(source, tasks="*", inputs=LATENT, views="one")


@pytest.mark.parametrize("views", ["every", "one"])
def test_samples_that_are_not_there_are_an_index_error(source, views):
    reader = PairReader(source, tasks="*", inputs=LATENT, views=views)
    for wrong in (-1, reader.num_samples):
        with pytest.raises(IndexError, match=f"no sample {wrong} among {reader.num_samples}"):
            reader.choose_pairs(np.array([0, wrong]), seed=0, epoch=0)


def test_a_layer_of_one_view_needs_no_groups(store_folder, monkeypatch):
    monkeypatch.delattr(Store, "read_index")
    source = open_layers(str(store_folder), reads_features=False)
    reader = PairReader(source, tasks="*", inputs=LATENT, views="one")
    assert reader.choose_pairs(np.array([2, 0]), seed=0, epoch=0).tolist() == [2, 0]


def test_groups_take_twelve_bytes_a_sample_at_most_and_tasks_may_be_empty():
    texts = {"key": ["b", "a", "b", "a"], "phrase": ["x", "x", "x", "y"], "instance": [0] * 4}
    parts = [group_views(pa.table(texts), rows) for rows in (None, np.array([], np.int32), [1, 3])]
    groups = ViewGroups.join(parts)
    assert groups.nums.tolist() == [3, 0, 2]
    assert (groups.pairs.tolist(), groups.firsts.tolist()) == ([0, 2, 1, 3, 0, 1], [0, 2, 3, 0, 1])
    assert (groups.pairs.itemsize, groups.firsts.itemsize, groups.hashes.itemsize) == (4, 4, 4)
    samples = ViewSamples(groups, np.array([0, 4, 4, 6]))
    assert samples.choose_pairs(np.array([1, 2, 3, 4]), seed=0, epoch=0).tolist() == [1, 3, 4, 5]
    assert samples.choose_pairs(np.array([0]), seed=0, epoch=0).item() in (0, 2)
    found = [samples.choose_pairs(np.array([0]), seed=3, epoch=epoch).item() for epoch in range(8)]
    assert found == [0, 2, 2, 2, 0, 0, 2, 2]  # pinned: other draws are another run


@pytest.mark.parametrize("none", [0, None])
def test_equal_phrases_of_a_key_are_no_views_of_one_another(none):
    """Stores from before instances were numbered have none, or 0, in each row."""
    names = {"key": ["a"] * 5, "phrase": ["x", "x", "x", "x", "y"]}
    schema = pa.schema([("key", pa.string()), ("phrase", pa.string()), ("instance", pa.int32())])
    before, after = (
        group_views(pa.table({**names, "instance": instances}, schema=schema), None)
        for instances in ([none] * 5, [0, 1, 1, 0, 0])
    )
    assert before.nums.tolist() == [2]
    assert (after.nums.tolist(), after.firsts.tolist()) == ([3], [0, 2, 4])
    assert after.pairs.tolist() == [0, 3, 1, 2, 4]
    assert len({*after.hashes.tolist()}) == 3
    assert after.hashes[[0, 2]].tolist() == before.hashes.tolist()  # epochs stay what they were


def test_views_of_an_image_without_a_phrase_are_one_sample():
    table = pa.table(
        {
            "key": ["a", "a", "a", "b", "a"],
            "phrase": [None, "dog", None, None, "dog"],
            "instance": pa.array([0] * 5, pa.int32()),
        }
    )
    groups = group_views(table, None)
    assert groups.pairs.tolist() == [0, 2, 1, 4, 3]
    assert groups.firsts.tolist() == [0, 2, 4]
    assert len(set(groups.hashes.tolist())) == 3
