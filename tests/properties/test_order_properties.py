"""For any number of pairs: an epoch is a permutation, and its split over workers loses nothing."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.read.order import WindowedOrder, count_steps, shuffle_positions, split_batch
from tests.support.examples import examples

seeds = st.integers(0, 2**63)


@examples(100)
@given(num=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 10**6))
def test_an_epoch_is_a_permutation(num, seed, epoch):
    order = shuffle_positions(np.arange(num), num=num, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(order), np.arange(num))


@examples(100)
@given(num=st.integers(1, 2**62), seed=seeds, data=st.data())
def test_positions_of_a_huge_epoch_stay_inside_and_apart(num, seed, data):
    positions = data.draw(st.lists(st.integers(0, num - 1), min_size=1, max_size=20, unique=True))
    order = shuffle_positions(np.array(positions), num=num, seed=seed, epoch=0)
    assert order.min() >= 0
    assert order.max() < num
    assert len(set(order.tolist())) == len(positions)


@examples(100)
@given(num=st.integers(1, 300), batch=st.integers(1, 40), num_workers=st.integers(1, 9))
def test_workers_together_see_the_epoch_in_order(num, batch, num_workers):
    """Whatever their number: interleaved, their shares are the positions 0, 1, 2 …"""
    seen = []
    for step in range(count_steps(num, batch)):
        shares = [
            split_batch(step, num=num, batch=batch, rank=rank, num_workers=num_workers).tolist()
            for rank in range(num_workers)
        ]
        longest = len(shares[0])
        assert all(longest - 1 <= len(share) <= longest for share in shares)
        seen += [share[i] for i in range(longest) for share in shares if i < len(share)]
    assert seen == list(range(num))


@examples(50)
@given(
    num=st.integers(1, 200),
    batch=st.integers(1, 20),
    before=st.integers(1, 5),
    after=st.integers(1, 5),
    data=st.data(),
)
def test_a_run_resumed_with_other_workers_sees_what_was_left(num, batch, before, after, data):
    num_steps = count_steps(num, batch)
    stop = data.draw(st.integers(0, num_steps))

    def positions(steps, num_workers):
        return [
            position
            for step in steps
            for rank in range(num_workers)
            for position in split_batch(
                step, num=num, batch=batch, rank=rank, num_workers=num_workers
            ).tolist()
        ]

    seen = positions(range(stop), before) + positions(range(stop, num_steps), after)
    assert sorted(seen) == list(range(num))


@examples(100)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(any),
    window=st.integers(1, 50),
    seed=seeds,
    data=st.data(),
)
def test_a_windowed_epoch_is_a_permutation_and_any_part_of_it_is_found_alone(
    lengths, window, seed, data
):
    starts = np.cumsum([0, *lengths])
    order = WindowedOrder(starts, window=window, seed=seed, epoch=0)
    whole = order.samples_at(np.arange(len(order)))
    assert np.array_equal(np.sort(whole), np.arange(sum(lengths)))
    some = np.array(data.draw(st.lists(st.integers(0, len(order) - 1), max_size=20)), int)
    again = WindowedOrder(starts, window=window, seed=seed, epoch=0)
    assert again.samples_at(some).tolist() == whole[some].tolist()
