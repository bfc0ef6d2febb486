"""The rows that need no head are what they say, on a corpus of any size."""

import numpy as np
import pytest
import torch

from pipeline.evaluate import baselines
from pipeline.evaluate.baselines import MeanMasks, mean_area, predict_foreground, sample_tasks
from pipeline.read.choice import PairChoice
from pipeline.read.reader import PairReader
from pipeline.read.source import open_layers


@pytest.fixture(scope="module")
def source(store_folder):
    return open_layers(str(store_folder))


@pytest.fixture(scope="module")
def train(source):
    return PairReader(source, tasks="*train*", inputs=frozenset())


@pytest.fixture(scope="module")
def pairs(source):
    reader = PairReader(source, tasks="*val*", inputs=frozenset())
    return reader.read(range(len(reader)), draws=[0] * len(reader))


def test_everything_is_foreground(pairs):
    found = predict_foreground(pairs)
    assert found.shape == pairs.mask.shape
    assert bool((found == 1).all())


@pytest.mark.parametrize("kept_bytes", [1, 2**28])
def test_a_phrases_mean_mask_is_that_of_its_training_pairs(train, pairs, monkeypatch, kept_bytes):
    monkeypatch.setattr(baselines, "CACHE_BYTES", kept_bytes)
    masks = train.read_masks(range(len(train)))[0].float()
    phrases = np.array(train.index["phrase"].to_pylist())
    found = MeanMasks(train)(pairs)
    num_seen = 0
    for phrase, mean in zip(pairs.phrases, found, strict=True):
        seen = phrases == phrase
        num_seen += bool(seen.any())
        assert torch.equal(mean, (masks[seen] if seen.any() else masks).mean(dim=0))
    assert 0 < num_seen < len(pairs.phrases)


def test_of_a_frequent_phrase_a_fixed_choice_is_read(train, pairs, monkeypatch):
    monkeypatch.setattr(baselines, "PHRASE_MASKS", 3)
    means = MeanMasks(train)
    assert torch.equal(means._overall, MeanMasks(train)._overall)
    assert set((means._overall * 3).unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_a_sample_is_whole_tasks_and_the_reader_itself_where_it_has_no_more(source, train):
    choice = PairChoice()
    assert sample_tasks(source, train, choice=choice) is train
    some = sample_tasks(source, train, choice=choice, num_tasks=1)
    (task,) = some.tasks
    number = train.tasks.index(task)
    start, end = train.task_starts[number : number + 2]
    assert some.index == train.index.slice(start, end - start)


def test_the_tasks_are_listed_once(source, monkeypatch):
    """A tuple of all is made each time: 250,000 tasks times 256 chosen took 7.5 s."""
    every = PairReader(source, tasks="*", inputs=frozenset())
    names, listed = every.tasks, []
    assert len(names) == 3
    monkeypatch.setattr(PairReader, "tasks", property(lambda _: listed.append(1) or names))
    sample_tasks(source, every, choice=PairChoice(), num_tasks=2)
    assert len(listed) == 1


def test_tasks_without_a_chosen_pair_are_passed_over(source, train):
    start = int(train.task_starts[1])
    key = train.index["key"][start].as_py()  # a pair of the second task
    phrase = train.index["phrase"][start].as_py()
    only = PairChoice(phrase=f"^{phrase}$")
    reader = PairReader(source, tasks="*train*", inputs=frozenset(), choice=only)
    some = sample_tasks(source, reader, choice=only, num_tasks=1)
    assert len(some) > 0
    assert key


def test_the_mean_area_is_that_of_the_masks(train):
    masks = train.read_masks(range(len(train)))[0].float()
    assert mean_area(train) == pytest.approx(float(masks.mean()), rel=1e-5)
