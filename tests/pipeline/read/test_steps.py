"""Which samples a step reads: the same over any workers, passes and read-ahead."""

import numpy as np
import pytest

from pipeline.read.steps import TrainOrder

STARTS = np.array([0, 7, 7, 12, 23])


def make(**changes):
    options = {"batch_size": 5, "accumulate": 1, "seed": 3, "window": None}
    return TrainOrder(STARTS, **(options | changes))


def read_global(step, num_workers, **changes):
    """The samples of a global batch as the workers' shares give them, interleaved again."""
    shares = []
    for rank in range(num_workers):
        order = make(rank=rank, num_workers=num_workers, **changes)
        share = order.split(step)
        assert all(len(part) for part in share.parts)
        found = [order.samples_at(part, epoch=share.epoch) for part in share.parts]
        shares.append(np.concatenate([*found, np.empty(0, np.int64)]).tolist())
    num = sum(map(len, shares))
    assert num == share.num_global
    return [shares[k % num_workers][k // num_workers] for k in range(num)]


@pytest.mark.parametrize("window", [None, 2])
def test_workers_and_passes_do_not_change_the_global_order(window):
    for step in range(12):
        expected = read_global(step, 1, window=window)
        for num_workers, accumulate in [(1, 2), (2, 1), (2, 2), (3, 1), (5, 1)]:
            found = read_global(step, num_workers, window=window, accumulate=accumulate)
            assert found == expected


@pytest.mark.parametrize("window", [None, 1, 2, 100])
def test_an_epoch_has_every_sample_once_and_epochs_differ(window):
    order = make(window=window)
    assert order.steps_an_epoch == 5
    epochs = [
        [n for step in range(5 * e, 5 * e + 5) for n in read_global(step, 1, window=window)]
        for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(23))
    assert epochs[0] != epochs[1]


def test_a_small_last_batch_leaves_some_workers_nothing():
    shares = [make(rank=rank, num_workers=4).split(4) for rank in range(4)]
    assert [len(share.parts) for share in shares] == [1, 1, 1, 0]
    assert {share.num_global for share in shares} == {3}


def test_a_share_is_cut_into_passes_of_near_equal_size():
    share = make(batch_size=11, accumulate=3).split(0)
    assert [len(part) for part in share.parts] == [4, 4, 3]


def test_windowed_reads_whole_tasks_at_a_time():
    first = read_global(0, 1, window=1, batch_size=5) + read_global(1, 1, window=1, batch_size=5)
    tasks = np.searchsorted(STARTS, first, side="right")
    assert len(np.unique(tasks[:5])) == 1


def test_draws_depend_on_seed_epoch_and_sample_alone():
    samples, order = np.arange(23), make(rank=1, num_workers=3, accumulate=1)
    whole = order.choose_draws(samples, epoch=0, draws=(0, 2, 5))
    assert set(whole.tolist()) == {0, 2, 5}
    some = make().choose_draws(samples[[9, 4]], epoch=0, draws=(0, 2, 5))
    assert some.tolist() == whole[[9, 4]].tolist()
    others = [
        order.choose_draws(samples, epoch=1, draws=(0, 2, 5)),
        make(seed=4).choose_draws(samples, epoch=0, draws=(0, 2, 5)),
    ]
    assert all((other != whole).any() for other in others)


def test_draws_are_read_equally_often_and_apart_from_the_order():
    order = TrainOrder(np.array([0, 30_000]), batch_size=1, accumulate=1, seed=0, window=None)
    samples = np.arange(30_000)
    draws = np.array([order.choose_draws(samples, epoch=e, draws=(0, 1, 2)) for e in range(4)])
    assert (np.apply_along_axis(np.bincount, 1, draws) == 10_000).all()
    together = np.mean(draws[0] == draws[1])  # epochs draw on their own: a third by chance
    assert abs(together - 1 / 3) < 0.015
    places = order.samples_at(samples, epoch=0)
    assert abs(np.corrcoef(draws[0], places)[0, 1]) < 0.03
