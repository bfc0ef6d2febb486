"""Rows read ahead: the stored values, each read about once, in bounded memory."""

import numpy as np
import pytest

from pipeline.stage import rows_ahead
from pipeline.stage.rows_ahead import RowsAhead
from pipeline.storage.local import LocalStorage
from pipeline.store.array_reader import ShardedArray
from pipeline.store.array_writer import ArrayWriter
from pipeline.store.layout import ArrayKind

KIND = ArrayKind("float16", ("prompt", "token", "channel"))
NUM_ROWS, ROW_SHAPE, ROW_BYTES, BATCH = 200, (4, 8), 64, 8


@pytest.fixture
def rows():
    return np.random.default_rng(0).standard_normal((NUM_ROWS, *ROW_SHAPE)).astype(np.float16)


@pytest.fixture
def array(tmp_path, rows, monkeypatch):
    """An array that notes the rows of each read; a read takes 16 rows ahead."""
    monkeypatch.setattr(rows_ahead, "AHEAD_BYTES", 16 * ROW_BYTES)
    storage = LocalStorage(tmp_path)
    writer = ArrayWriter(storage, "g", KIND.schema("text", ROW_SHAPE))
    writer.append_rows(rows)
    writer.close()
    metadata = storage.read("g/text/zarr.json")
    return NotesReads(storage, "g/text", KIND, num_rows=NUM_ROWS, metadata=metadata)


class NotesReads(ShardedArray):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.reads = []

    def read_rows(self, rows):
        self.reads.append(list(rows))
        return super().read_rows(rows)


def read_in_batches(ahead, order):
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return np.concatenate([ahead(batch) for batch in batches])


def scatter(num, below):
    return np.random.default_rng(1).integers(0, below, num).tolist()


@pytest.mark.parametrize(
    "order",
    [list(range(NUM_ROWS)), scatter(800, NUM_ROWS), [0] * 30, sorted(scatter(300, NUM_ROWS))],
    ids=["in order", "scattered", "one", "ascending"],
)
def test_every_row_needed_is_read_once_some_at_a_time(array, rows, order):
    found = read_in_batches(RowsAhead(array, order), order)
    np.testing.assert_array_equal(found, rows[order])
    needed = list(dict.fromkeys(order))
    assert [row for read in array.reads for row in read] == needed
    assert len(array.reads) == -(-len(needed) // 16)


def test_no_more_is_kept_than_allowed_and_what_went_is_read_again(array, rows):
    order = scatter(800, NUM_ROWS)
    ahead = RowsAhead(array, order, kept_bytes=40 * ROW_BYTES)
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        np.testing.assert_array_equal(ahead(batch), rows[batch])
        assert ahead._kept.cost <= 40 * ROW_BYTES
        assert all(values.base is None for values in ahead._kept._values.values())
    assert NUM_ROWS < sum(map(len, array.reads)) < len(order)


def test_rows_that_are_more_than_what_is_kept_are_read_all_the_same(array, rows):
    ahead = RowsAhead(array, range(NUM_ROWS), kept_bytes=ROW_BYTES)
    np.testing.assert_array_equal(ahead(range(50)), rows[:50])


def test_rows_beyond_the_order_foretold_are_read_too(array, rows):
    ahead = RowsAhead(array, [0, 1])
    np.testing.assert_array_equal(ahead([5, 0, 5]), rows[[5, 0, 5]])
