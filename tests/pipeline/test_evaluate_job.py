"""``ldznet evaluate``: the rows of a checkpoint, alike on any number of workers."""

import numpy as np
import pytest

from models.metrics import SegmentationMetrics
from pipeline.baselines import BASELINE_FOREGROUND, BASELINE_MEAN_MASK
from pipeline.checkpoint import load_checkpoint
from pipeline.evaluate_job import format_rows, prepare_scoring, run_evaluate
from pipeline.pair_choice import PairChoice
from pipeline.score_pairs import PairScorer, choose_pairs
from pipeline.spec import SpecError
from tests.train_runs import fit_here, make

CONFIG = make(
    head="probe",
    num_steps=2,
    batch_size=8,
    data={"validation_filter": PairChoice(max_area=0.2), "draws": (0,)},
)


@pytest.fixture(scope="module")
def out(tmp_path_factory, store_folder):
    folder = tmp_path_factory.mktemp("run")
    fit_here(CONFIG, store_folder, folder)
    return folder


@pytest.fixture(scope="module")
def rows(out, store_folder):
    return run_evaluate(str(store_folder), out, batch=4)


def prepare(out, store_folder, **options):
    head, record = load_checkpoint(out)
    defaults = {"tasks": None, "batch": 4, "limit": None}
    return PairScorer(
        prepare_scoring(head, record, str(store_folder), **(defaults | options)), head
    )


def test_rows_are_the_head_and_two_baselines(rows):
    assert [row.name for row in rows] == ["probe", BASELINE_FOREGROUND, BASELINE_MEAN_MASK]
    assert [row.baseline for row in rows] == [False, True, True]
    assert len({row.scores.num_pairs for row in rows}) == 1


def test_shares_of_workers_add_up_to_the_same_digits(out, store_folder, rows):
    scorer = prepare(out, store_folder)
    num_batches = -(-len(scorer.numbers) // 4)
    for num_workers in (2, 3):
        totals = [SegmentationMetrics() for _ in rows]
        for rank in range(num_workers):
            for total, part in zip(
                totals, scorer.count(range(rank, num_batches, num_workers)), strict=True
            ):
                total.merge(part)
        assert [total.compute() for total in totals] == [row.scores for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_of_ray_give_the_same_digits(out, store_folder, rows, num_workers):
    assert run_evaluate(str(store_folder), out, batch=4, num_workers=num_workers) == rows


def test_the_configs_filter_holds_for_its_own_tasks_alone(out, store_folder):
    ours = prepare(out, store_folder)
    every = prepare(out, store_folder, tasks="*val*")
    assert 0 < len(ours.numbers) < len(every.numbers)


def test_limit_takes_a_fixed_subset_in_order():
    chosen = choose_pairs(1000, 10)
    assert len(set(chosen)) == 10
    assert list(chosen) == sorted(chosen)
    assert list(chosen) == list(choose_pairs(1000, 10))
    assert np.array_equal(choose_pairs(3, 10), [0, 1, 2])


def test_what_is_missing_is_named(tmp_path, out, store_folder):
    with pytest.raises(SpecError, match="expected a checkpoint"):
        run_evaluate(str(store_folder), tmp_path)
    with pytest.raises(SpecError, match=r"tasks 'x\*': expected at least one committed pair"):
        run_evaluate(str(store_folder), out, tasks="x*", num_workers=2)  # before Ray starts


def test_the_table_is_in_percent(rows):
    lines = format_rows(rows).splitlines()
    assert len(lines) == 4
    assert f"{100 * rows[1].scores.IoU_FG:.1f}" in lines[2]
