"""The cost of tasks on Ray Data, measured at two sizes."""

import pytest

from pipeline.bench.tasks import measure_tasks


@pytest.mark.slow
def test_every_task_has_its_outcome_at_each_size():
    rows = measure_tasks([20, 10], num_actors=1)
    assert [(row.tasks, row.window) for row in rows] == [(10, 10), (20, 20), (20, 10)]
    assert all(row.peak_mb >= row.before_mb > 0 and row.cpu_ms_a_task > 0 for row in rows)
