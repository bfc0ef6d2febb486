"""The cost of tasks on Ray Data, measured at two sizes."""

import pytest

<<<<<<< HEAD
from pipeline.bench.tasks import measure_tasks
=======
from pipeline.bench.tasks import TARGET, TaskCost, carry_on, measure_tasks
from pipeline.encode.actor_pool import WINDOW

pytestmark = pytest.mark.thorough


def make_row(tasks, window, *, before_mb, grown_mb, cpu_ms=4.0):
    return TaskCost(
        tasks=tasks,
        window=window,
        measured=True,
        start_s=3.0,
        wall_ms_a_task=5.0,
        cpu_ms_a_task=cpu_ms,
        before_mb=before_mb,
        grown_mb=grown_mb,
        peak_mb=before_mb + grown_mb,
    )


def test_memory_goes_on_by_a_window_and_by_what_windows_leave():
    """10 kB a task within a window, 1 kB a task after it, 2 kB an item."""
    short = make_row(1000, 1000, before_mb=202.0, grown_mb=30.0)
    long = make_row(10_000, 10_000, before_mb=220.0, grown_mb=120.0)
    windows = make_row(10_000, 1000, before_mb=220.0, grown_mb=39.0, cpu_ms=6.0)
    row = carry_on(short, long, windows, TARGET)
    assert row.before_mb == pytest.approx(200 + 0.002 * TARGET)
    assert row.grown_mb == pytest.approx(30 + 0.010 * (WINDOW - 1000) + 0.001 * (TARGET - WINDOW))
    assert row.peak_mb == pytest.approx(row.before_mb + row.grown_mb)
    assert (row.cpu_ms_a_task, row.measured, row.window) == (6.0, False, WINDOW)
>>>>>>> 5b641e7 (A mark thorough: what takes long for what it shows leaves make test, and continuous integration adds it)


@pytest.mark.slow
def test_every_task_has_its_outcome_at_each_size():
    rows = measure_tasks([20, 10], num_actors=1)
    assert [(row.tasks, row.window) for row in rows] == [(10, 10), (20, 20), (20, 10)]
    assert all(row.peak_mb >= row.before_mb > 0 and row.cpu_ms_a_task > 0 for row in rows)
