"""``ldznet evaluate``: the rows of a checkpoint, alike on any number of workers."""

import shutil

import numpy as np
import pytest

from models.heads.metrics import SegmentationMetrics
from pipeline.base.yaml import SpecError
from pipeline.evaluate.baselines import BASELINE_FOREGROUND, BASELINE_MEAN_MASK
from pipeline.evaluate.pair_scorer import PairScorer
from pipeline.evaluate.run import NEWEST, build_scoring_job, format_rows, run_evaluate
from pipeline.evaluate.scoring import choose_pairs
from pipeline.read.choice import PairChoice
from pipeline.read.source import open_layers
from pipeline.runs.checkpoint import load_checkpoint
from pipeline.store.snapshot import create_snapshot
from tests.support.train_runs import fit_here, make

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
    return run_evaluate(str(store_folder), out, batch_size=4)


def prepare(out, store_folder, **options):
    head, record = load_checkpoint(out)
    defaults = {"tasks": None, "batch_size": 4, "limit": None, "snapshot": None}
    return PairScorer(build_scoring_job(record, str(store_folder), **(defaults | options)), head)


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
    assert run_evaluate(str(store_folder), out, batch_size=4, num_workers=num_workers) == rows


def test_the_configs_filter_holds_for_its_own_tasks_alone(out, store_folder):
    ours = prepare(out, store_folder)
    every = prepare(out, store_folder, tasks="*val*")
    assert 0 < len(ours.numbers) < len(every.numbers)


@pytest.fixture(scope="module")
def grown(tmp_path_factory, store_folder):
    """A store to which a task was committed after a run began, and the run."""
    folder, out = tmp_path_factory.mktemp("grown") / "store", tmp_path_factory.mktemp("grown-run")
    shutil.copytree(store_folder, folder, ignore=shutil.ignore_patterns("inventory"))
    late = {path: path.read_bytes() for path in folder.glob("*/commits/*train-00001*")}
    assert len(late) == 2
    for path in late:
        path.unlink()
    source = open_layers(str(folder))
    create_snapshot(source.store, source.snapshot.records)
    fit_here(make(CONFIG, head="znet"), folder, out)
    for path, data in late.items():
        path.write_bytes(data)
    return folder, out


@pytest.mark.thorough
def test_pairs_are_the_runs_own_though_the_store_grew(grown):
    folder, out = grown
    _, record = load_checkpoint(out)
    own, newest, named = (
        run_evaluate(str(folder), out, tasks="*", snapshot=snapshot, limit=20)
        for snapshot in (None, NEWEST, record.snapshot)
    )
    assert own == named
    assert {row.snapshot for row in own} == {record.snapshot}
    assert {row.snapshot for row in newest} == {open_layers(str(folder)).snapshot.digest}
    assert format_rows(newest).endswith(f"\nsnapshot {newest[0].snapshot}")
    nums = [len(prepare(out, folder, tasks="*", snapshot=x).numbers) for x in (None, NEWEST)]
    assert nums[0] < nums[1]


def test_tasks_and_layers_outside_of_a_snapshot_are_named(grown):
    folder, out = grown
    with pytest.raises(
        SpecError, match=r"no task of .*read was snapshot .*, --snapshot newest takes"
    ):
        run_evaluate(str(folder), out, tasks="*train-00001*")
    with pytest.raises(SpecError, match="holds no snapshot 'x'"):
        run_evaluate(str(folder), out, snapshot="x")
    source = open_layers(str(folder))
    only = create_snapshot(source.store, [source.latents.folder])
    with pytest.raises(SpecError, match=f"--snapshot: {only.digest} holds .*, without features-"):
        run_evaluate(str(folder), out, snapshot=only.digest)


def test_a_store_without_the_runs_snapshot_is_scored_as_it_is(out, copied_store, rows, caplog):
    shutil.rmtree(copied_store / "snapshots", ignore_errors=True)  # other tests' of the shared one
    again = run_evaluate(str(copied_store), out, batch_size=4)
    assert again == rows
    assert again[0].snapshot == open_layers(str(copied_store)).snapshot.digest
    assert "holds no snapshot" in caplog.text


def test_limit_takes_a_fixed_subset_in_order():
    chosen = choose_pairs(1000, 10)
    assert len(set(chosen)) == 10
    assert list(chosen) == sorted(chosen)
    assert list(chosen) == list(choose_pairs(1000, 10))
    assert np.array_equal(choose_pairs(3, 10), [0, 1, 2])


def test_what_is_missing_is_named(tmp_path, out, store_folder):
    with pytest.raises(SpecError, match="expected a checkpoint"):
        run_evaluate(str(store_folder), tmp_path)
    with pytest.raises(SpecError, match=r"--tasks: 'x\*': no task of"):
        run_evaluate(str(store_folder), out, tasks="x*", num_workers=2)  # before Ray starts


def test_the_table_is_in_percent(rows):
    lines = format_rows(rows).splitlines()
    assert lines[0].split() == ["mIoU", "threshold", "IoU_FG", "AP", "AP_clipseg", "pairs"]
    assert len(lines) == 6
    scores = rows[1].scores
    percent = [f"{100 * x:.1f}" for x in (scores.IoU_FG, scores.AP, scores.AP_clipseg)]
    assert lines[2].removeprefix(rows[1].name).split()[1:5] == ["0.02", *percent]
