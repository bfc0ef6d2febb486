"""The reader's benchmark reads the same bytes by every reader."""

import numpy as np
import pytest

from pipeline.bench import reader as bench_reader
from pipeline.bench.reader import OURS, PLAIN, ZARR, measure_reader
from pipeline.bench.reader_store import BLOCKS, write_plain_file, write_reader_store
from pipeline.storage.local import LocalStorage

pytestmark = pytest.mark.thorough


def test_every_reader_is_measured_against_both_peers(tmp_path):
    rows = measure_reader(tmp_path, num_tasks=2, task_pairs=3, batch=2, turns=1, many_tasks=3)
    names = [row.reader for row in rows]
    assert names[0] == PLAIN
    assert names[1:4] == [f"{OURS}, 1 thread", f"{OURS}, 2 threads", f"{OURS}, 4 threads"]
    assert ZARR in names
    by_name = {row.reader: row for row in rows}
    assert by_name[PLAIN].of_plain == by_name[ZARR].of_zarr == 1
    assert all(row.gb_per_s > 0 for row in rows)
    assert rows[-1].reader == f"{OURS}, 3 tiny tasks"
    assert [row.of_few is not None for row in rows] == [False] * (len(rows) - 1) + [True]


def test_all_read_the_same_values(tmp_path):
    source = write_reader_store(LocalStorage(tmp_path / "store"), num_tasks=2, task_pairs=2)
    write_plain_file(source, tmp_path / "plain")
    numbers = np.array([3, 0])
    plain, arrays = (
        bench_reader._open_plain(tmp_path / "plain", 2),
        bench_reader._open_zarr(source, 2),
    )
    plain(numbers)
    arrays(numbers)
    ours = bench_reader._open_ours(source).read_features(numbers, draws=[0, 0])
    outs = [
        next(
            cell.cell_contents
            for cell in read.__closure__
            if isinstance(cell.cell_contents, np.ndarray) and cell.cell_contents.flags.writeable
        )
        for read in (plain, arrays)
    ]
    for place, block in enumerate(BLOCKS):
        mine = ours[block].numpy()
        np.testing.assert_array_equal(mine.reshape(2, -1).view(np.uint8), outs[0][place])
        np.testing.assert_array_equal(mine, outs[1][place])
        assert np.unique(mine).size > 1000


def test_objects_are_measured_beside_raw_requests(s3_url):
    rows = bench_reader.measure_objects(s3_url, num_tasks=2, task_pairs=2, batch=2, turns=1)
    assert [row.reader for row in rows] == [bench_reader.GETS, OURS]
    assert rows[0].of_plain == pytest.approx(1)
    assert all(row.of_zarr is None for row in rows)
