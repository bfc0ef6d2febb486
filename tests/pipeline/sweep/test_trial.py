"""One trial: its figures, what it goes on from, and how it fails alone."""

import json
import shutil
from dataclasses import asdict

import pyarrow.parquet as pq
import pytest

from pipeline.base.yaml import SpecError
from pipeline.evaluate.run import run_evaluate
from pipeline.runs.checkpoint import find_checkpoint, list_checkpoints
from pipeline.runs.lock import RunHeldError
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.run import SweepRun, open_sweep, run_sweep
from pipeline.sweep.trial import TrialResult, read_result, run_trial
from pipeline.sweep.trials import plan_sweep

HEAD = {"name": "probe", "blocks": [8]}
BASE = {"head": HEAD, "num_steps": 4, "batch_size": 4, "log_every": 1, "checkpoint_every": 2}
BASE |= {"learning_rate": 3e-3, "validation_pairs": 1000, "ema_decay": 0.5, "overlays": False}


def plan(store_folder, out, axes=None, tests=None, **changes):
    given = {"base": BASE | changes, "axes": axes or {}, "tests": tests or {}}
    config = SweepConfig.model_validate(given)
    return plan_sweep(config, str(store_folder), out)


def steps_logged(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [r["step"] for r in map(json.loads, lines) if "loss" in r]


def test_a_trials_figures_are_those_of_evaluate(store_folder, tmp_path):
    found = plan(store_folder, tmp_path)
    probe, baselines = (run_trial(found, trial) for trial in found.trials)
    assert probe.error is baselines.error is None
    rows = run_evaluate(str(store_folder), found.folder(found.trials[0]))
    assert [row.name for row in rows] == [*probe.rows, *baselines.rows]
    for row in rows:
        assert {**probe.rows, **baselines.rows}[row.name] == asdict(row.scores)
    written = (found.folder(found.trials[0]) / "result.json").stat().st_mtime_ns
    assert run_trial(found, found.trials[0]) == probe
    assert (found.folder(found.trials[0]) / "result.json").stat().st_mtime_ns == written
    assert probe.run["steps"] == 4
    assert probe.run["pairs_per_s"] > 0
    assert 0 <= probe.run["data_wait"] <= 1
    assert (tmp_path / probe.run["checkpoint"]) == find_checkpoint(found.folder(found.trials[0]))


def test_a_finished_trial_is_not_run_again(store_folder, tmp_path):
    found = plan(store_folder, tmp_path, {"seeds": [0]})
    run_sweep(found, at_once=0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "trials").rglob("*")}
    more = plan(store_folder, tmp_path, {"seeds": [1, 0]})
    run = run_sweep(more, at_once=0)
    assert len(run.done) == 3
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before
    table = pq.read_table(tmp_path / "results.parquet")
    assert table["seed"].to_pylist() == [1, 0, None, None]


def test_a_new_test_scores_the_head_that_is_there(store_folder, tmp_path):
    run_sweep(plan(store_folder, tmp_path), at_once=0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "trials").rglob("*")}
    before = {path: at for path, at in before.items() if path.is_file()}
    tests = {"training's own": {"tasks": "*train*", "limit": 7}, "one word": TWO_WORDS}
    found = plan(store_folder, tmp_path, tests=tests)
    run = run_sweep(found, at_once=0)
    assert not run.failures
    assert {path: path.stat().st_mtime_ns for path in before} == before
    rows = run_evaluate(str(store_folder), found.folder(found.trials[0]), tasks="*train*", limit=7)
    expected = {row.name: asdict(row.scores) for row in rows}
    scored = {}
    for result in run.results.values():
        scored |= result.tests["training's own"]
    assert scored == expected
    table = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [row["scored_on"] for row in table[:3]] == ["validation", "training's own", "one word"]
    assert {row["num_pairs"] for row in table if row["scored_on"] == "training's own"} == {7}
    assert "| training's own " in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_figures_of_before_ap_was_the_average_precision_are_made_again(store_folder, tmp_path):
    """They were CLIPSeg's; the head is not trained again."""
    found = plan(store_folder, tmp_path, tests={"two words": TWO_WORDS})
    run_sweep(found, at_once=0)
    expected = pq.read_table(tmp_path / "results.parquet").to_pylist()
    for path in [*tmp_path.glob("trials/*/result.json"), *tmp_path.glob("trials/*/test-*.json")]:
        plain = json.loads(path.read_text(encoding="utf-8"))
        for row in plain.get("rows", plain).values():
            row["AP"] = row.pop("AP_clipseg")
            del row["mIoU_threshold"], row["IoU_FG_threshold"]
        path.write_text(json.dumps(plain), encoding="utf-8")
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("trials/*/metrics.jsonl")}
    assert [read_result(found, trial).rows for trial in found.trials] == [{}, {}]
    run = run_sweep(found, at_once=0)
    assert len(run.done) == 2
    assert pq.read_table(tmp_path / "results.parquet").to_pylist() == expected
    assert logs == {path: path.stat().st_mtime_ns for path in logs}


def test_a_head_of_before_whose_weights_are_gone_is_trained_again(store_folder, tmp_path):
    found = plan(store_folder, tmp_path)
    run_sweep(found, at_once=0)
    expected = read_result(found, found.trials[0]).rows
    folder = found.folder(found.trials[0])
    old = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    for row in old["rows"].values():
        del row["AP_clipseg"]
    (folder / "result.json").write_text(json.dumps(old), encoding="utf-8")
    (folder / "best").unlink()
    shutil.rmtree(folder / "checkpoints")
    assert not run_sweep(found, at_once=0).failures
    assert read_result(found, found.trials[0]).rows == expected


TWO_WORDS = {"tasks": "*val*", "filter": {"phrase": "^[a-z]+ [a-z]+$"}}


def test_what_was_found_stays_in_the_table_while_a_new_test_fails(store_folder, tmp_path):
    run_sweep(plan(store_folder, tmp_path), at_once=0)
    found = plan(store_folder, tmp_path, tests={"new": TWO_WORDS})
    trial = found.trials[0]
    weights = find_checkpoint(found.folder(trial)) / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(b"damaged")
    run = run_sweep(found, at_once=0)
    assert list(run.failures) == [trial.id]
    assert len(run.done) == 1
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    of_trial = [(row["status"], row["scored_on"]) for row in rows if row["trial"] == trial.id]
    assert of_trial == [("failed", None), ("done", "validation")]
    weights.write_bytes(kept)
    run = run_sweep(found, at_once=0)
    assert not run.failures
    assert len(run.done) == 2
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert {row["status"] for row in rows} == {"done"}


def test_baselines_keep_their_names_beside_what_they_were_scored_on(store_folder, tmp_path):
    run_sweep(plan(store_folder, tmp_path, tests={"new": TWO_WORDS}), at_once=0)
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| everything foreground       | new " in table
    assert "| everything foreground       | validation " in table


@pytest.mark.parametrize(
    ("tests", "match"),
    [
        ({"none such": {"tasks": "*nowhere*"}}, "tests: 'none such': .*nowhere"),
        ({"no pairs": {"tasks": "*val*", "filter": {"phrase": "zebra"}}}, "tests: 'no pairs': "),
    ],
)
def test_a_test_without_pairs_stops_before_the_first_trial(store_folder, tmp_path, tests, match):
    with pytest.raises(SpecError, match=match):
        plan(store_folder, tmp_path, tests=tests)
    assert not (tmp_path / "trials").exists()


def test_a_test_called_validation_is_refused(store_folder, tmp_path):
    with pytest.raises(ValueError, match="the name of the validation pairs"):
        plan(store_folder, tmp_path, tests={"validation": TWO_WORDS})


def test_an_unfinished_trial_goes_on_from_its_checkpoint(store_folder, tmp_path):
    """Cut off after two steps; what was made before is not made again, and the end is the same."""
    whole = plan(store_folder, tmp_path / "whole")
    parts = plan(store_folder, tmp_path / "parts")
    expected = run_trial(whole, whole.trials[0])
    (trial, _), folder = parts.trials, parts.folder(parts.trials[0])
    run_trial(parts, trial)
    (folder / "result.json").unlink()
    first, last = list_checkpoints(folder)
    last.rename(tmp_path / "gone")
    (folder / "best").unlink(missing_ok=True)
    made = first.stat().st_mtime_ns
    again = run_trial(parts, trial)
    assert again.rows == expected.rows
    assert first.stat().st_mtime_ns == made
    assert steps_logged(folder) == [1, 2, 3, 4]


def test_a_trial_that_ended_but_for_its_result_takes_no_more_steps(store_folder, tmp_path):
    found = plan(store_folder, tmp_path)
    folder = found.folder(found.trials[0])
    before = run_trial(found, found.trials[0])
    (folder / "result.json").unlink()
    made = find_checkpoint(folder).stat().st_mtime_ns
    assert run_trial(found, found.trials[0]).rows == before.rows
    assert find_checkpoint(folder).stat().st_mtime_ns == made


def test_a_failed_trial_is_recorded_and_the_others_go_on(store_folder, tmp_path):
    changes = {"clip_norm": 1e12}
    found = plan(store_folder, tmp_path, {"learning_rate": [1e30, 1e-3]}, **changes)
    run = run_sweep(found, at_once=0)
    (failure,) = run.failures.values()
    assert failure.trial == found.trials[0].id
    assert failure.error.startswith("FloatingPointError: step ")
    assert len(run.done) == 2
    said = run.describe(command="ldznet sweep again")
    assert "learning_rate 1e+30: FloatingPointError: step " in said
    assert f"(trials/{failure.trial})" in said
    assert said.endswith("to try them again:\n  ldznet sweep again")
    assert read_result(found, found.trials[0]).error == failure.error
    assert len(run_sweep(found, at_once=0).failures) == 1  # tried again, and failed again


def test_a_sweep_that_is_refused_leaves_the_other_ones_pin(copied_store, tmp_path):
    """The second reads a layer more, so that its plan would pin another snapshot."""
    pin = tmp_path / "out" / "sweep.json"
    first, second = (
        SweepConfig.model_validate({"base": BASE | {"head": {"name": name}}})
        for name in ("znet", "probe")
    )
    with open_sweep(first, str(copied_store), tmp_path / "out"):
        pinned = pin.read_bytes()
        with pytest.raises(RunHeldError, match="another run writes here"):
            with open_sweep(second, str(copied_store), tmp_path / "out"):
                pass
        assert pin.read_bytes() == pinned
    with open_sweep(second, str(copied_store), tmp_path / "out"):
        assert pin.read_bytes() != pinned


def test_a_trial_without_a_checkpoint_says_so(store_folder, tmp_path):
    found = plan(store_folder, tmp_path)
    with pytest.raises(SpecError, match="expected a checkpoint"):
        find_checkpoint(found.folder(found.trials[0]))


def test_counts_are_those_of_the_outcomes_also_where_one_is_replaced(store_folder, tmp_path):
    run = SweepRun(plan(store_folder, tmp_path, {"seeds": [0, 1]}))
    first, second, _ = (trial.id for trial in run.plan.trials)
    run.add(TrialResult(first, {}, {}, "ValueError: why"))
    run.add(TrialResult(second, {}, {}))
    assert (len(run.done), len(run.failures)) == (1, 1)
    run.add(TrialResult(first, {}, {}))
    assert (len(run.done), run.failures) == (2, {})
