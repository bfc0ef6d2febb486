"""The tables of a sweep: a row a trial, and settings with mean and spread over seeds."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.base.yaml import parse_yaml
from pipeline.evaluate.scoring import FIGURE_NAMES
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.results import Spread, format_failures, group_rows, list_rows, write_results
from pipeline.sweep.trial import TrialResult
from pipeline.sweep.trials import plan_sweep

TEXT = """
base: {head: {name: probe}, num_steps: 2, validation_pairs: 4}
axes: {head: [znet, probe], blocks: {each: [6, 8]}, seeds: [0, 1, 2]}
"""
AP = {"znet": (0.5, 0.6, 0.7), 6: (0.25, 0.25, 0.25), 8: (0.125, 0.25, 0.75)}
OTHERS = {"AP_clipseg": -0.5, "mIoU_threshold": 0.02, "IoU_FG_threshold": 0.02}


@pytest.fixture(scope="module")
def plan(store_folder, tmp_path_factory):
    config = parse_yaml(TEXT, SweepConfig, where="")
    return plan_sweep(config, str(store_folder), tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def results(plan):
    found = {}
    for trial in plan.trials:
        run = {"steps": 2, "seconds": 1.5, "checkpoint": "trials/x", "snapshot": "s"}
        if trial.is_baselines:
            rows = {"everything foreground": {"mIoU": 0.1, "IoU_FG": 0.2, "AP": 0.12} | OTHERS}
        else:
            head = trial.config.head
            ap = AP[head.blocks[0] if head.name == "probe" else "znet"][trial.config.seed]
            at = {"mIoU_threshold": (0.34, 0.36, 0.35)[trial.config.seed]}
            rows = {head.name: {"mIoU": ap / 2, "IoU_FG": ap / 4, "AP": ap} | OTHERS | at}
        found[trial.id] = TrialResult(trial.id, rows, run)
    return found


def test_a_spread_is_the_mean_and_the_sample_standard_deviation():
    spread = Spread.of([0.5, 0.6, 0.7])
    assert spread.mean == pytest.approx(0.6)
    assert spread.deviation == pytest.approx(0.1)  # sqrt((0.01 + 0 + 0.01) / 2)
    assert spread.format() == "60.0 ± 10.0"
    assert Spread.of([0.123]).format() == "12.3"


def test_rows_are_grouped_over_seeds_alone(plan, results):
    groups = group_rows(list_rows(plan, results))
    got = [(row["head"], row["blocks"], spread["AP"]) for row, spread in groups]
    assert [(head, blocks) for head, blocks, _ in got] == [
        ("znet", None),
        ("probe", [6]),
        ("probe", [8]),
    ]
    for (_, _, spread), name in zip(got, AP, strict=True):
        assert spread.num == 3
        assert spread.mean == pytest.approx(np.mean(AP[name]))
        assert spread.deviation == pytest.approx(np.std(AP[name], ddof=1))


def test_the_table_says_what_differs_in_percent(plan, results):
    rows = write_results(plan, results)
    text = (plan.out / "results.md").read_text(encoding="utf-8")
    cells = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    assert cells[0] == ["head", "blocks", "mIoU", "IoU_FG", "AP", "threshold", "seeds"]
    assert cells[2] == ["znet", "", "30.0 ± 5.0", "15.0 ± 2.5", "60.0 ± 10.0", "0.35", "3"]
    assert cells[4] == ["probe", "8", "18.8 ± 16.5", "9.4 ± 8.3", "37.5 ± 33.1", "0.35", "3"]
    assert cells[5] == ["everything foreground", "", "10.0", "20.0", "12.0", "0.02", ""]
    assert "10 of 10 trials are done" in text
    table = pq.read_table(plan.out / "results.parquet")
    assert table.num_rows == len(rows) == 10
    assert table["AP"].to_pylist()[:9] == [ap for name in AP for ap in AP[name]]
    assert table["mIoU_threshold"].to_pylist()[:3] == [0.34, 0.36, 0.35]
    assert set(table["AP_clipseg"].to_pylist()) == {-0.5}
    assert table["blocks"].to_pylist()[0] is None
    assert table["seed"].to_pylist()[:3] == [0, 1, 2]
    assert set(table["status"].to_pylist()) == {"done"}
    assert not list(plan.out.glob(".results*"))


def test_a_row_says_how_many_pairs_its_own_trial_is_validated_on(store_folder, tmp_path):
    text = TEXT.split("axes")[0] + "variants: [{name: a}, {name: b, validation_pairs: 3}]"
    plan = plan_sweep(parse_yaml(text, SweepConfig, where=""), str(store_folder), tmp_path)
    figures = dict.fromkeys(FIGURE_NAMES, 0.5)
    rows = list_rows(plan, {t.id: TrialResult(t.id, {"x": figures}, {}) for t in plan.trials})
    assert [row["num_pairs"] for row in rows] == [4, 3, 4, 3]


def test_failed_trials_are_listed_and_not_averaged(plan, results):
    first = plan.trials[0].id
    failed = results | {first: TrialResult(first, {}, {}, "ValueError: why\nmore")}
    rows = write_results(plan, failed)
    assert [row["status"] for row in rows].count("failed") == 1
    assert group_rows(rows)[0][1]["AP"].num == 2
    text = (plan.out / "results.md").read_text(encoding="utf-8")
    assert f"- head znet, seed 0: ValueError: why (trials/{first})\n" in text
    assert "9 of 10 trials are done, 1 failed" in text
    assert (
        pq.read_table(plan.out / "results.parquet")["error"][0].as_py() == "ValueError: why\nmore"
    )


def test_failures_are_named_by_what_differs_a_line_for_each_reason(plan):
    heads = [trial for trial in plan.trials if not trial.is_baselines]
    found = {(*t.config.head.blocks, t.config.seed): t.id for t in heads}
    gone, nan = "FileNotFoundError: gone\n  at some line", "FloatingPointError: nan"
    errors = {found[1,]: gone, found[6, 2]: nan, found[8, 0]: gone, plan.trials[-1].id: nan}
    assert format_failures(plan, errors) == [
        "head znet, seed 1; head probe, blocks 8, seed 0: FileNotFoundError: gone "
        f"(trials/{found[1,]}, …)",
        "head probe, blocks 6, seed 2; baselines: "
        f"FloatingPointError: nan (trials/{found[6, 2]}, …)",
    ]
    every = dict.fromkeys(found.values(), gone)
    (line,) = format_failures(plan, every)
    assert line.startswith("all 9 heads: FileNotFoundError: gone (trials/")
    (line,) = format_failures(plan, dict(list(every.items())[:6]))
    assert line.count("seed ") == 4
    assert "; and 2 more: FileNotFoundError" in line


def test_the_only_head_of_a_sweep_has_its_own_name(store_folder, tmp_path):
    text = "base: {head: {name: znet}, num_steps: 2, validation_pairs: 4}"
    one = plan_sweep(parse_yaml(text, SweepConfig, where=""), str(store_folder), tmp_path)
    (line,) = format_failures(one, {one.trials[0].id: "ValueError: why"})
    assert line == f"znet: ValueError: why (trials/{one.trials[0].id})"
