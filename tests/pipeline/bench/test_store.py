"""The store's benchmarks: real records, requests counted, rows in order. No times are held."""

import math

import pytest
from typer.testing import CliRunner

from jobs.__main__ import app
from pipeline.bench.fresh_process import read_memory_mb, run_fresh
from pipeline.bench.reader_store import BLOCK_SHAPE
from pipeline.bench.store import (
    STEPS,
    CountingStorage,
    list_bench_tasks,
    make_layers,
    make_record,
    measure_store,
    write_records,
)
from pipeline.bench.write import count_rows, measure_write, write_task
from pipeline.storage.local import LocalStorage
from pipeline.store.commit import list_records, read_commit
from pipeline.store.store import Store
from pipeline.upkeep.verify import verify_store

pytestmark = pytest.mark.thorough

ROW_BYTES = 3 * math.prod(BLOCK_SHAPE) * 2  # of one block


def run_here(function, *arguments):
    return function(*arguments)


def test_records_are_real_ones_of_every_task(tmp_path):
    write_records(tmp_path, 3)
    storage = LocalStorage(tmp_path)
    for layer in make_layers():
        records = list_records(storage, layer.folder)
        assert sorted(records) == [task.id for task in list_bench_tasks(3)]
        commits = [read_commit(storage, layer.folder, record) for record in records.values()]
        assert len({commit.attempt for commit in commits}) == 3
        assert all(commit.files for commit in commits)
        assert {len(commit.files) for commit in commits} == {len(make_record(layer).files)}


def test_listings_count_a_request_a_thousand_names(tmp_path):
    for number in range(2001):
        (tmp_path / f"{number}").touch()
    counting = CountingStorage(LocalStorage(tmp_path))
    assert len(list(counting.list_names())) == 2001
    assert counting.num_requests == 3
    counting.read("7")
    assert counting.num_requests == 4
    assert list(counting.list_names("none")) == []
    assert counting.num_requests == 5
    assert counting.url == str(tmp_path)


def test_times_are_neither_told_nor_counted(tmp_path):
    (tmp_path / "7").touch()
    counting = CountingStorage(LocalStorage(tmp_path))
    assert counting.find_time("7") is None
    assert counting.list_times("none") == {}
    assert counting.num_requests == 0


def test_every_step_is_measured_at_every_size(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.store.records.MIN_KEPT", 1)
    rows = measure_store(tmp_path, [20, 5], run=run_here)
    assert [(row.step, row.tasks) for row in rows] == [(s, n) for s in STEPS for n in (5, 20)]
    assert all((row.growth is None) == (row.tasks == 5) for row in rows)
    requests = {(row.step, row.tasks): row.requests for row in rows}
    assert requests["list missing", 5] == requests["list missing", 20]
    assert requests["list missing, no table", 20] - requests["list missing", 20] >= 19
    assert requests["open snapshot", 20] == 2
    for step in ("open reader", "inspect"):
        assert requests[step, 20] == requests[step, 5]
        assert requests[f"{step}, no table", 20] - requests[step, 20] >= 2 * 20


def test_what_is_written_is_a_sound_commit(tmp_path):
    num_bytes, seconds, read_back_s = write_task(tmp_path, 3)
    assert 0 < read_back_s < seconds
    _, layer = make_layers()
    store = Store(LocalStorage(tmp_path))
    store.add_layer(layer)
    (check,) = verify_store(store)
    assert check.num_bytes == num_bytes > 3 * 5 * ROW_BYTES
    assert [d.what for d in check.damage if "its latents" not in d.what] == []


def test_writers_take_turns_and_leave_nothing(tmp_path):
    rows = measure_write(tmp_path, 10**7, repeats=2)
    writers = ["attempt", "attempt, not read back", "dd"]
    assert [(row.run, row.writer) for row in rows] == [(n, w) for n in (1, 2) for w in writers]
    assert all((row.of_dd is None) == (row.writer == "dd") for row in rows)
    assert len({row.mb for row in rows}) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("num_bytes", "rows"), [(1, 1), (2 * 10**9, 361)])
def test_bytes_become_rows(num_bytes, rows):
    assert count_rows(num_bytes) == rows


def write_and_read_peak(folder, num_rows):
    num_bytes, *_ = write_task(folder / str(num_rows), num_rows, num_blocks=1)
    return num_bytes / 1e6, read_memory_mb("VmHWM")


def test_memory_does_not_grow_with_the_task(tmp_path):
    (short_mb, short_peak_mb), (long_mb, long_peak_mb) = (
        run_fresh(write_and_read_peak, tmp_path, num_rows) for num_rows in (8, 208)
    )
    assert long_mb - short_mb == pytest.approx(200 * ROW_BYTES / 1e6, rel=0.01)
    assert long_peak_mb - short_peak_mb < 20  # of 221 MB more that are written


def test_commands_print_tables_and_refuse_bad_sizes(tmp_path):
    options = ["--gb", "0.01", "--repeats", "1", "--dir", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "write", *options])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("| writer ")
    assert list(tmp_path.iterdir()) == []
    assert CliRunner().invoke(app, ["bench", "store", "--tasks", "3,x"]).exit_code == 2
