"""A DataLoader over the store reads what the reader does, and what was left of an epoch."""

import json
import pickle
import re
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.read.choice import PairChoice
from pipeline.read.dataset import EpochSampler, PairDataset, keep_batch
from pipeline.read.reader import PairReader
from pipeline.read.source import open_layers

INPUTS = frozenset({"latent", "features"})
STARTS = np.array([0, 40, 45, 103])


@pytest.fixture
def reader(copied_store):
    source = open_layers(str(copied_store))
    return PairReader(source, tasks="*", inputs=INPUTS, blocks=(7,), num_threads=2)


def assert_same(one, other):
    assert (one.keys, one.phrases) == (other.keys, other.phrases)
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(one.inputs["latent"], other.inputs["latent"])
    assert torch.equal(one.inputs["features"][7], other.inputs["features"][7])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_worker_processes_read_what_the_reader_does(reader, context):
    """Also those forked from a process whose reader has threads and open files."""
    sampler = EpochSampler(reader.sample_starts, batch_size=9, seed=3)
    sampler.load_state_dict({"epoch": 2, "position": 18})
    dataset = PairDataset(reader, seed=3)
    here = [dataset.__getitems__(numbers) for numbers in sampler]
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=2,
        collate_fn=keep_batch,
        multiprocessing_context=context,
    )
    there = list(loader)
    assert len(here) == len(there) == len(sampler) > 1
    for one, other in zip(here, there, strict=True):
        assert_same(one, other)


class TwoDraws(Dataset):
    """A dataset of one's own: each pair with both of its draws."""

    def __init__(self, reader):
        self.reader = reader

    def __getitems__(self, numbers):
        later = self.reader.read_features(numbers, draws=[1] * len(numbers))
        return self.reader.read(numbers, draws=[0] * len(numbers)), later


@pytest.mark.parametrize("persistent", [False, True])
def test_a_reader_that_was_used_reads_in_forked_workers(reader, persistent):
    """Its threads are the parent's alone, and one reads there while the workers are forked."""
    dataset, batches = TwoDraws(reader), [[0, 5, 3], [2, 9], [7], [1, 8]]
    here = [dataset.__getitems__(numbers) for numbers in batches]
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=2,
        collate_fn=keep_batch,
        multiprocessing_context="fork",
        persistent_workers=persistent,
        timeout=60,  # of a worker that hangs, an error
    )
    over = threading.Event()

    def keep_reading():
        while not over.is_set():
            reader._gatherer._arrays.clear()  # so that caches are filled, under their locks
            dataset.__getitems__([4, 6])

    thread = threading.Thread(target=keep_reading)
    thread.start()
    try:
        for _ in range(2):
            for (one, later), (other, then) in zip(here, loader, strict=True):
                assert_same(one, other)
                assert torch.equal(later[7], then[7])
    finally:
        over.set()
        thread.join()


def test_a_dataset_reads_views_and_draws_of_the_epoch(reader):
    dataset, num = PairDataset(reader, seed=1), len(reader)
    assert len(dataset) == num
    first, later = (dataset.__getitems__(range(e * num, (e + 1) * num)) for e in (0, 1))
    assert (first.keys, first.phrases) == (later.keys, later.phrases)
    draws = [reader.read(range(num), draws=[d] * num).inputs["features"][7] for d in (0, 1)]
    taken = [
        [int(torch.equal(value, draws[1][n])) for n, value in enumerate(x.inputs["features"][7])]
        for x in (first, later)
    ]
    assert taken[0] != taken[1]
    assert abs(sum(taken[0]) - num / 2) <= 1
    only = PairDataset(reader, seed=1, draws=[1])
    assert torch.equal(only.__getitems__(range(num)).inputs["features"][7], draws[1])
    assert_same(dataset[3], dataset.__getitems__([3]))
    assert dataset.__getitems__([]) is None
    with pytest.raises(ValueError, match="expected numbers of epoch 0, got some of"):
        dataset.__getitems__([0, num])


def test_a_pickled_reader_reads_no_record_again(reader, monkeypatch):
    numbers, draws = [4, 0, 7], [1, 0, 1]
    expected = reader.read(numbers, draws=draws)
    data = pickle.dumps(reader)
    assert b"ThreadPool" not in data
    monkeypatch.setattr("pipeline.read.commits.RecordTable", None)
    monkeypatch.setattr("pipeline.read.commits.read_commit", None)
    again = pickle.loads(data)
    assert (len(again), again.tasks) == (len(reader), reader.tasks)
    monkeypatch.undo()
    assert_same(again.read(numbers, draws=draws), expected)


def place_of(sampler):
    state = sampler.state_dict()
    return {name: state[name] for name in ("epoch", "position")}


def run(sampler):
    return [number for batch in sampler for number in batch]


@pytest.mark.parametrize("order", ["global", "windowed"])
def test_a_resumed_sampler_gives_exactly_what_was_left(order):
    def make(**options):
        options = {"batch_size": 10, "seed": 5, "order": order, "window": 2, "max_run": 7} | options
        return EpochSampler(STARTS, **options)

    whole = run(make())
    assert sorted(whole) == list(range(103))
    sampler = make()
    for used, batch in enumerate(sampler):
        assert batch == whole[used * 10 : used * 10 + 10]
        sampler.advance()
        if used == 3:
            break
    state = json.loads(json.dumps(sampler.state_dict()))
    assert place_of(sampler) == {"epoch": 0, "position": 40}
    for num_ranks in (1, 2, 3):
        ranks = [make(rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        for one in ranks:
            one.load_state_dict(state)
        batches = list(zip(*ranks, strict=True))
        assert len(batches) == len(ranks[0]) == 7
        merged = [sorted(number for share in batch for number in share) for batch in batches]
        assert merged == [sorted(whole[at : at + 10]) for at in range(40, 103, 10)]
        assert batches[0][-1] == whole[40:50][num_ranks - 1 :: num_ranks]
    other = make(batch_size=16)
    other.load_state_dict(state)
    assert run(other) == whole[40:]


def test_epochs_follow_each_other_and_differ():
    sampler = EpochSampler(STARTS, batch_size=50, seed=0)
    orders = []
    for epoch in range(3):
        assert place_of(sampler) == {"epoch": epoch, "position": 0}
        orders.append([number - epoch * 103 for number in run(sampler)])
        sampler.advance(len(sampler))
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(103)) for order in orders)


def test_batches_past_the_end_count_into_later_epochs():
    sampler = EpochSampler(STARTS, batch_size=40, seed=0)  # 3 batches an epoch
    sampler.advance(5)
    assert place_of(sampler) == {"epoch": 1, "position": 80}
    one_by_one = EpochSampler(STARTS, batch_size=40, seed=0)
    for _ in range(5 + 7):
        one_by_one.advance()
    sampler.advance(0)
    sampler.advance(7)
    assert sampler.state_dict() == one_by_one.state_dict()
    assert place_of(sampler) == {"epoch": 4, "position": 0}
    with pytest.raises(ValueError, match="expected a number of batches used from 0, got -1"):
        sampler.advance(-1)


def test_a_dataset_without_texts_reads_none(reader, monkeypatch):
    monkeypatch.setattr("pipeline.read.pair_index.PairIndex.read_texts", None)
    batch = PairDataset(reader, seed=1, texts=False).__getitems__([3, 0])
    assert (batch.keys, batch.phrases, len(batch.mask)) == ((), (), 2)


def test_windows_keep_runs_together():
    sampler = EpochSampler(STARTS, batch_size=5, seed=0, order="windowed", window=1, max_run=5)
    for batch in sampler:
        assert max(batch) - min(batch) < 10


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"rank": 2, "num_ranks": 2}, {"rank": -1}])
def test_ranks_and_batches_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="expected a batch of at least 1 and a rank in"):
        EpochSampler(STARTS, **({"batch_size": 4} | options))


@pytest.mark.parametrize("state", [{"epoch": 0, "position": 103}, {"epoch": -1, "position": 0}])
def test_a_state_of_other_samples_is_refused(state):
    with pytest.raises(ValueError, match="the state is of other samples"):
        EpochSampler(STARTS, batch_size=4).load_state_dict(state)


def open_reader(reader, tasks="*", **options):
    return PairReader(reader._source, tasks=tasks, inputs=INPUTS, blocks=(7,), **options)


def test_a_state_is_taken_up_on_the_same_samples_alone(reader):
    """Another number of them, or as many others, as of another snapshot or a renewed tar."""
    state = EpochSampler(reader, batch_size=4, seed=1).state_dict()
    EpochSampler(open_reader(reader), batch_size=8, seed=1).load_state_dict(state)
    fewer = open_reader(reader, "*train*")
    expected = rf"num_samples was {len(reader)}, is {len(fewer)}; .*samples was \w+, is"
    for now in (fewer, fewer.sample_starts):
        with pytest.raises(ValueError, match=expected if now is fewer else "num_samples was"):
            EpochSampler(now, batch_size=4, seed=1).load_state_dict(state)
    keys = fewer.index["key"].to_pylist()
    same = [key for key in dict.fromkeys(keys) if keys.count(key) == keys.count(keys[0])][:2]
    one, other = (
        open_reader(reader, "*", choice=PairChoice(where=(("key", "==", k),))) for k in same
    )
    assert one.num_samples == other.num_samples
    state = EpochSampler(one, batch_size=4).state_dict()
    with pytest.raises(ValueError, match=r"samples was \w{16}, is \w{16}\. Read the snapshot"):
        EpochSampler(other, batch_size=4).load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"order": "windowed"}, "order was global, is windowed"),
        ({"starts": np.array([0, 40, 46, 103])}, r"starts was \w{16}, is \w{16}"),
        ({"starts": np.array([0, 40, 45, 103, 120])}, "num_samples was 103, is 120"),
        ({"starts": np.array([0, 40, 45])}, "num_samples was 103, is 45"),
    ],
)
def test_a_state_of_another_order_is_refused(changes, expected):
    state = EpochSampler(STARTS, batch_size=4).state_dict()
    starts = changes.pop("starts", STARTS)
    with pytest.raises(ValueError, match=expected):
        EpochSampler(starts, batch_size=4, **changes).load_state_dict(state)


def test_a_state_that_does_not_tell_its_samples_is_taken_with_a_warning(caplog):
    sampler = EpochSampler(STARTS, batch_size=4)
    sampler.load_state_dict({"epoch": 1, "position": 8})
    assert "does not tell of which samples it is" in caplog.text
    caplog.clear()
    EpochSampler(STARTS, batch_size=4).load_state_dict(sampler.state_dict())
    assert not caplog.text


@pytest.mark.parametrize("draws", [(), (0, 9), (-1,)])
def test_draws_that_are_not_stored_are_named_at_once(reader, draws):
    with pytest.raises(
        ValueError, match=rf"^draws: expected some of 0 to \d+, got {re.escape(str(draws))}"
    ):
        PairDataset(reader, draws=draws)
