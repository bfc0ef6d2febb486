"""Scoring: batches come as they are cut, and who computes them changes no digit."""

import numpy as np
import pytest
import torch

from models.metrics import SegmentationMetrics
from pipeline.build_head import build_head
from pipeline.evaluate import (
    ScoredRow,
    count_batches,
    count_pairs,
    count_threads,
    evaluation_draw,
    iterate_batches,
    predict,
)
from pipeline.reader import PairReader
from pipeline.train_config import HeadConfig
from tests.train_runs import CPU, open_source


@pytest.fixture(scope="module")
def source(store_folder):
    return open_source(store_folder)


@pytest.fixture(scope="module")
def reader(source):
    return PairReader(source, tasks="*", inputs=frozenset({"latent", "text"}))


def test_batches_come_in_order_whatever_their_size(reader):
    keys = reader.index["key"].to_pylist()
    numbers = np.arange(len(reader))
    for batch in (1, 3, 100):
        found = list(iterate_batches(reader, numbers, batch=batch, draw=0))
        assert len(found) == count_batches(len(reader), batch)
        assert [key for pairs in found for key in pairs.keys] == keys
    found = list(iterate_batches(reader, numbers, batch=3, draw=0, which=[4, 1]))
    assert [list(pairs.keys) for pairs in found] == [keys[12:15], keys[3:6]]
    assert list(iterate_batches(reader, numbers, batch=3, draw=0, which=[])) == []


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
            [score], reader, numbers, batch=16, draw=0, which=which, num_threads=num_threads
        )
        return found

    alone = count(None, 1)
    torch.set_num_threads(2)
    try:
        for num_workers in (1, 2, 3):
            total = SegmentationMetrics()
            for rank in range(num_workers):
                total.merge(count(range(rank, count_batches(len(numbers), 16), num_workers), 3))
            assert total.compute() == alone.compute()
            for name, value in alone.state().items():
                assert torch.equal(total.state()[name], value)
        assert torch.get_num_threads() == count_threads(CPU) == 2
    finally:
        torch.set_num_threads(1)
    assert alone.compute().num_pairs == len(numbers)


def test_progress_is_heard_and_may_end_the_work(reader):
    heard = []

    def hear(done):
        heard.append(done)
        if done >= 6:
            raise InterruptedError("enough")

    numbers = np.arange(len(reader))
    with pytest.raises(InterruptedError, match="enough"):
        count_pairs(
            [lambda pairs: pairs.mask.float()], reader, numbers, batch=3, draw=0, on_batch=hear
        )
    assert heard == [3, 6]
    assert torch.get_num_threads() == 1


def test_a_perfect_predictor_scores_one(reader):
    (found,) = count_pairs(
        [lambda pairs: pairs.mask.float()], reader, np.arange(5), batch=2, draw=0
    )
    scores = found.compute()
    assert scores.mIoU == pytest.approx(1, abs=0.01)
    assert ScoredRow("x", scores).figures()["num_pairs"] == 5


def test_the_middle_draw_is_read():
    assert [evaluation_draw(num) for num in (1, 2, 3)] == [0, 1, 1]
    assert evaluation_draw(3, (2, 0)) == 2
    assert evaluation_draw(5, [0, 4, 3]) == 3
