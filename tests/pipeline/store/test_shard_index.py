"""Shard indexes: two numbers where chunks lie as they are written, else a table."""

import numpy as np
import pytest

from pipeline.store.array_writer import MISSING
from pipeline.store.shard_index import ShardIndex, keep_indexes

GONE = (MISSING, MISSING)


def parse(*entries, end=100):
    return ShardIndex.parse(np.array(entries, dtype="<u8"), end)


def test_a_regular_index_is_two_numbers():
    index = parse((0, 10), (10, 10), (20, 10), GONE, end=30)
    assert index.table is None
    assert [index.locate(chunk) for chunk in range(4)] == [(0, 10), (10, 10), (20, 10), (30, 0)]
    assert index.num_bytes < 1000


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ([(0, 10), (10, 11), (21, 10)], [(0, 10), (10, 11), (21, 10)]),
        ([(10, 10), (0, 10), (20, 10)], [(10, 10), (0, 10), (20, 10)]),
        ([(0, 10), GONE, (20, 10)], [(0, 10), (0, 0), (20, 10)]),
        ([GONE, (0, 10), (10, 10)], [(0, 0), (0, 10), (10, 10)]),
        ([(0, 10), (10, 10), (20, MISSING)], [(0, 10), (10, 10), (0, 0)]),
        ([(0, 10), (10, 10), (MISSING, 10)], [(0, 10), (10, 10), (0, 0)]),
        ([(0, 3), (3, 10), (95, 10)], [(0, 0), (3, 10), (0, 0)]),
        ([(0, 10), (2**63, 2**63), (91, 10)], [(0, 10), (0, 0), (0, 0)]),
        ([(90, 10), (91, 9), (100, 4)], [(90, 10), (91, 9), (0, 0)]),
    ],
)
def test_any_other_index_is_a_table(entries, found):
    index = parse(*entries)
    assert index.table is not None
    assert [index.locate(chunk) for chunk in range(3)] == found


def test_chunks_one_after_another_are_four_bytes_each():
    index = parse((0, 10), (10, 11), (21, 10), GONE, end=31)
    assert (index.table.dtype, index.table.tolist()) == (np.uint32, [0, 10, 21, 31])
    assert [index.locate(chunk) for chunk in (2, 3)] == [(21, 10), (0, 0)]
    far = 2**32
    index = parse((0, far), (far, 10), end=far + 10)
    assert [index.locate(chunk) for chunk in (0, 1)] == [(0, far), (far, 10)]


def test_nothing_stored_is_nothing_found():
    index = parse(GONE, GONE, end=0)
    assert [index.locate(chunk)[1] for chunk in range(2)] == [0, 0]


def test_a_million_shards_fit_where_a_few_tables_do():
    recent = keep_indexes(max_bytes=100_000)
    regular, table = parse((0, 10), (10, 10)), parse(*[(1, 10)] * 1000)
    for number in range(1000):
        recent.get_or_make(f"c/{number}", lambda: regular)
    assert 90_000 < recent.cost <= 100_000
    for number in range(20):
        recent.get_or_make(f"d/{number}", lambda: table)
    assert recent.cost <= 100_000
