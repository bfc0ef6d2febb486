"""The order of an epoch: pinned, and split over workers without a gap."""

import numpy as np
import pytest

from pipeline.order import count_steps, shuffle_positions, split_batch

GOLDEN = [7, 0, 1, 5, 4, 6, 2, 9, 3, 8]
GOLDEN_FAR = [865637486967, 137657355785]


def shuffle(num, *, seed=0, epoch=0):
    return shuffle_positions(np.arange(num), num=num, seed=seed, epoch=epoch).tolist()


def test_the_order_is_pinned():
    """A resumed run relies on it: another order is another run."""
    assert shuffle(10) == GOLDEN
    far = shuffle_positions(np.array([0, 10**12 - 1]), num=10**12, seed=7, epoch=3)
    assert far.tolist() == GOLDEN_FAR


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_an_epoch_holds_every_pair_once(num):
    assert sorted(shuffle(num)) == list(range(num))


def test_seeds_and_epochs_differ():
    orders = {tuple(shuffle(50, seed=s, epoch=e)) for s in (0, 1, 11) for e in (0, 1, 11)}
    assert len(orders) == 9


def test_a_position_alone_is_as_in_the_whole():
    whole = shuffle(1000, seed=3)
    some = np.array([999, 0, 500, 500])
    found = shuffle_positions(some, num=1000, seed=3, epoch=0)
    assert found.tolist() == [whole[position] for position in some]
    assert found.dtype == np.int64
    assert some.tolist() == [999, 0, 500, 500]  # left as it was


def test_no_positions_give_no_pairs():
    assert shuffle_positions(np.arange(0), num=0, seed=0, epoch=0).tolist() == []
    assert shuffle_positions(np.arange(0), num=9, seed=0, epoch=0).tolist() == []


@pytest.mark.parametrize("positions", [[-1], [0, 10], [10]])
def test_positions_outside_are_an_error(positions):
    with pytest.raises(IndexError, match=r"positions must be in \[0, 10\)"):
        shuffle_positions(np.array(positions), num=10, seed=0, epoch=0)


def test_the_order_is_not_the_old_one():
    """Neither near its place nor near its neighbours: the mean distances of a random order."""
    order = np.array(shuffle(10_000))
    assert abs(np.abs(order - np.arange(10_000)).mean() - 10_000 / 3) < 150
    assert abs(np.abs(np.diff(order)).mean() - 10_000 / 3) < 150


@pytest.mark.parametrize(("num", "batch", "steps"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2)])
def test_steps_of_an_epoch(num, batch, steps):
    assert count_steps(num, batch) == steps


def test_workers_share_a_batch():
    def shares(step):
        return [
            split_batch(step, num=10, batch=6, rank=rank, num_workers=4).tolist()
            for rank in range(4)
        ]

    assert shares(0) == [[0, 4], [1, 5], [2], [3]]
    assert shares(1) == [[6], [7], [8], [9]]
    assert split_batch(2, num=13, batch=6, rank=3, num_workers=4).tolist() == []
