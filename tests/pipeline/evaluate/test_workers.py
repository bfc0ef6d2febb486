"""Evaluation on Ray where the cluster has less room than was asked for: it ends all the same."""

import pytest
import ray

from pipeline.base.ray_cluster import ray_running
from pipeline.evaluate import workers as evaluate_workers
from pipeline.evaluate.run import build_scoring_job, run_evaluate
from pipeline.evaluate.workers import count_on_workers
from pipeline.runs.checkpoint import load_checkpoint
from tests.support.train_runs import fit_here, make


@pytest.mark.slow
def test_workers_without_room_are_not_waited_for(tmp_path, store_folder, monkeypatch):
    fit_here(make(head="probe", num_steps=1, validation_pairs=1), store_folder, tmp_path)
    rows = run_evaluate(str(store_folder), tmp_path, batch_size=2)
    with ray_running(num_cpus=1):  # room for one of three
        assert run_evaluate(str(store_folder), tmp_path, batch_size=2, num_workers=3) == rows
        holding = ray.remote(_Holding).options(num_cpus=1).remote()
        ray.get(holding.hold.remote())
        monkeypatch.setattr(evaluate_workers, "START_LIMIT_S", 1.0)
        head, record = load_checkpoint(tmp_path)
        scoring = build_scoring_job(
            record, str(store_folder), tasks=None, batch_size=2, limit=None, snapshot=None
        )
        with pytest.raises(RuntimeError, match=r"none of 3 workers found room .* 0 of 1 CPUs"):
            count_on_workers(scoring, head, 4, num_workers=3, on_pairs=lambda num: None)


class _Holding:
    def hold(self):
        """Hold a CPU."""
