"""The order of an epoch: pinned, and split over workers without a gap."""

import numpy as np
import pytest

from pipeline.read.order import (
    WindowedOrder,
    count_steps,
    cut_runs,
    shuffle_positions,
    split_batch,
)

GOLDEN = [7, 0, 1, 5, 4, 6, 2, 9, 3, 8]
GOLDEN_FAR = [865637486967, 137657355785]


def measure_shuffle(order, starts):
    """Return how random an epoch's order is, two figures that are 1 for a global shuffle.

    The first is the mean distance of a pair from its own number over that of a random order, a
    third of the pairs. The second is the share of runs among ``starts`` that 64 consecutive pairs
    are of, over the share expected of pairs drawn one by one: how mixed a batch is.
    """
    num = len(order)
    spread = float(np.abs(order - np.arange(num)).mean() / (num / 3))
    runs = np.searchsorted(starts, order, side="right")
    size = min(64, num)
    batches = runs[: num - num % size].reshape(-1, size)
    distinct = float(np.mean([len(np.unique(batch)) for batch in batches]))
    shares = np.diff(starts) / num
    return spread, distinct / float((1 - (1 - shares) ** size).sum())


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


STARTS = np.array([0, 4, 4, 9, 12, 20, 27])


def windowed(starts, *, window, seed=0, epoch=0):
    order = WindowedOrder(starts, window=window, seed=seed, epoch=epoch)
    return order.samples_at(np.arange(len(order)))


def test_the_windowed_order_is_pinned():
    assert windowed(np.array([0, 3, 6, 10]), window=2).tolist() == WINDOWED


WINDOWED = [3, 2, 0, 4, 1, 5, 9, 7, 8, 6]


@pytest.mark.parametrize("window", [1, 2, 4, 6, 100])
def test_a_window_holds_its_runs_and_no_others(window):
    order = WindowedOrder(STARTS, window=window, seed=2, epoch=1)
    found = order.samples_at(np.arange(27))
    assert sorted(found.tolist()) == list(range(27))
    runs_of = np.searchsorted(STARTS, found, side="right") - 1
    first, num_windows = 0, 0
    for end in order.window_ends:
        here = set(runs_of[first:end].tolist())
        assert len(here) <= window
        for run in here:
            assert set(range(STARTS[run], STARTS[run + 1])) <= set(found[first:end].tolist())
        first, num_windows = int(end), num_windows + 1
    assert first == 27
    assert num_windows == -(-6 // window)


def test_windowed_orders_of_seeds_and_epochs_differ():
    orders = {
        tuple(windowed(STARTS, window=2, seed=s, epoch=e)) for s in (0, 1, 11) for e in (0, 1, 11)
    }
    assert len(orders) == 9


def test_runs_are_tasks_cut_where_they_are_long():
    assert cut_runs(np.array([0, 3, 3, 10]), 3).tolist() == [0, 3, 6, 9, 10]
    assert cut_runs(np.array([0, 3, 10]), 100).tolist() == [0, 3, 10]


@pytest.mark.parametrize(("starts", "window"), [([0, 5], 0), ([0], 1), ([1, 5], 1), ([0, 5, 3], 1)])
def test_runs_that_cannot_be_are_refused(starts, window):
    with pytest.raises(ValueError, match="expected run starts from 0, ascending, and a window"):
        WindowedOrder(np.array(starts), window=window, seed=0, epoch=0)


@pytest.mark.parametrize("positions", [[-1], [27]])
def test_positions_outside_a_windowed_epoch_are_an_error(positions):
    with pytest.raises(IndexError, match=r"positions must be in \[0, 27\)"):
        WindowedOrder(STARTS, window=2, seed=0, epoch=0).samples_at(np.array(positions))


def test_randomness_is_measured():
    """1 for a global shuffle, near 0 for none, between them for a window."""
    starts = np.arange(0, 20_001, 100)
    shuffled = np.array(shuffle(20_000))
    assert measure_shuffle(shuffled, starts) == pytest.approx((1, 1), abs=0.03)
    spread, mixed = measure_shuffle(np.arange(20_000), starts)
    assert spread == 0
    assert mixed < 0.04
    few, more = (measure_shuffle(windowed(starts, window=w), starts) for w in (4, 32))
    assert few[0] == pytest.approx(1, abs=0.15)  # runs lie anywhere
    assert 0.07 < few[1] < 0.09  # 4, where windows meet 8, of the 55 runs of 64 random pairs
    assert 0.4 < more[1] < 0.6
    assert measure_shuffle(windowed(starts, window=200), starts)[1] == pytest.approx(1, abs=0.03)
