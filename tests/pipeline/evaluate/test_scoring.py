"""Scoring: batches come as they are cut, and who computes them changes no digit."""

import threading

import numpy as np
import pytest
import torch

from models.heads.metrics import SegmentationMetrics
from pipeline.evaluate import scoring as evaluate
from pipeline.evaluate.scoring import (
    count_at_once,
    count_pairs,
    count_threads,
    evaluation_draw,
    iterate_batches,
    predict,
)
from pipeline.read.order import count_steps
from pipeline.read.reader import PairReader
from pipeline.read.source import open_layers
from pipeline.runs.config import HeadConfig
from pipeline.runs.new_head import build_head
from tests.support.train_runs import CPU


@pytest.fixture(scope="module")
def source(store_folder):
    return open_layers(str(store_folder))


@pytest.fixture(scope="module")
def reader(source):
    return PairReader(source, tasks="*", inputs=frozenset({"latent", "text"}))


def test_batches_come_in_order_whatever_their_size(reader):
    keys = reader.index["key"].to_pylist()
    numbers = np.arange(len(reader))
    for batch in (1, 3, 100):
        found = list(iterate_batches(reader, numbers, batch_size=batch, draw=0))
        assert len(found) == count_steps(len(reader), batch)
        assert [key for pairs in found for key in pairs.keys] == keys
    found = list(iterate_batches(reader, numbers, batch_size=3, draw=0, which=[4, 1]))
    assert [list(pairs.keys) for pairs in found] == [keys[12:15], keys[3:6]]
    assert list(iterate_batches(reader, numbers, batch_size=3, draw=0, which=[])) == []


@pytest.fixture(scope="module")
def head(source):
    torch.manual_seed(0)
    return build_head(HeadConfig(name="znet"), source.latents, source.features).eval()


def test_who_computes_a_batch_changes_no_digit(reader, head):
    """With two threads a batch torch would add in another order; see ``count_pairs``."""
    numbers = np.arange(len(reader))

    def score(pairs):
        return predict(head, pairs, device=CPU)

    def count(which, num_threads):
        (found,) = count_pairs(
            [score], reader, numbers, batch_size=16, draw=0, which=which, num_threads=num_threads
        )
        return found

    alone = count(None, 1)
    torch.set_num_threads(2)
    try:
        for num_workers in (1, 2, 3):
            total = SegmentationMetrics()
            for rank in range(num_workers):
                total.merge(count(range(rank, count_steps(len(numbers), 16), num_workers), 3))
            assert total.compute() == alone.compute()
            for name, value in alone.state().items():
                assert torch.equal(total.state()[name], value)
        assert torch.get_num_threads() == count_threads(CPU) == 2
    finally:
        torch.set_num_threads(1)
    assert alone.compute().num_pairs == len(numbers)


def test_progress_is_recorded_and_may_end_the_work(reader):
    recorded = []

    def record(done):
        recorded.append(done)
        if done >= 6:
            raise InterruptedError("enough")

    numbers = np.arange(len(reader))
    with pytest.raises(InterruptedError, match="enough"):
        count_pairs(
            [lambda pairs: pairs.mask.float()],
            reader,
            numbers,
            batch_size=3,
            draw=0,
            on_batch=record,
        )
    assert recorded == [3, 6]
    assert torch.get_num_threads() == 1


def test_what_is_counted_still_ends_with_the_work(reader):
    """The other batches in memory get no further than the predictor that they are at."""
    entered, left, done = threading.Barrier(3), threading.Event(), []

    def wait(pairs):
        if pairs.keys != first:
            entered.wait(10)  # for the two other batches and the one that ends the work
            assert left.wait(10)
        return pairs.mask.float()

    def mark(pairs):
        done.append(pairs.keys)
        return pairs.mask.float()

    def end(num_done):
        entered.wait(10)
        threading.Timer(0.2, left.set).start()
        raise InterruptedError("enough")

    first = reader.read(range(3), draws=[0] * 3).keys
    numbers = np.arange(9)
    with pytest.raises(InterruptedError, match="enough"):
        count_pairs(
            [wait, mark], reader, numbers, batch_size=3, draw=0, num_threads=3, on_batch=end
        )
    assert done == [first]


def test_batches_at_once_are_bound_by_their_bytes_and_a_cap(reader, monkeypatch):
    pairs = reader.read(range(4), draws=[0] * 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert count_threads(CPU) == evaluate.MAX_AT_ONCE
    assert count_threads(torch.device("cuda")) == 1
    assert count_at_once(pairs, 64) == 64
    num_bytes = pairs.mask.nbytes + sum(value.nbytes for value in pairs.inputs.values())
    monkeypatch.setattr(evaluate, "AT_ONCE_BYTES", 10 * num_bytes)
    assert 1 < count_at_once(pairs, 64) <= 10
    monkeypatch.setattr(evaluate, "AT_ONCE_BYTES", 1)
    assert count_at_once(pairs, 64) == 1


def test_features_count_as_float32_too(source, monkeypatch):
    features = PairReader(source, tasks="*", inputs=frozenset({"features"}), blocks=(6,))
    pairs = features.read([0], draws=[0])
    (block,) = pairs.inputs["features"].values()
    assert block.dtype == torch.float16
    each = 3 * block.nbytes + 3 * pairs.mask.nbytes
    monkeypatch.setattr(evaluate, "AT_ONCE_BYTES", 2 * each - 1)
    assert count_at_once(pairs, 9) == 1
    monkeypatch.setattr(evaluate, "AT_ONCE_BYTES", 2 * each)
    assert count_at_once(pairs, 9) == 2


def test_a_perfect_predictor_scores_one(reader):
    (found,) = count_pairs(
        [lambda pairs: pairs.mask.float()], reader, np.arange(5), batch_size=2, draw=0
    )
    scores = found.compute()
    assert scores.mIoU == pytest.approx(1, abs=0.01)
    assert scores.num_pairs == 5


def test_the_middle_draw_is_read():
    assert [evaluation_draw(range(num)) for num in (1, 2, 3)] == [0, 1, 1]
    assert evaluation_draw((2, 0)) == 2
    assert evaluation_draw([0, 4, 3]) == 3
