"""A sweep's plan: checked against the store before the first trial, ids that stay."""

import json

import pytest
import yaml

from pipeline.spec import SpecError
from pipeline.sweep_config import SweepConfig
from pipeline.sweep_plan import plan_sweep

HEAD = {"name": "probe"}
BASE = {"head": HEAD, "num_steps": 2, "batch_size": 4, "validation_pairs": 4}


def plan(store_folder, out, text="", **changes):
    plain = yaml.safe_load(text) or {}
    config = SweepConfig.model_validate({"base": BASE | changes, **plain})
    return plan_sweep(config, str(store_folder), out)


def ids(found):
    return [trial.id for trial in found.trials if not trial.is_baselines]


def test_ids_stay_over_runs_folders_and_more_seeds(store_folder, tmp_path):
    first = plan(store_folder, tmp_path / "a", "axes: {seeds: [0, 1]}")
    assert len(set(ids(first))) == 2
    assert ids(plan(store_folder, tmp_path / "a", "axes: {seeds: [0, 1]}")) == ids(first)
    more = plan(store_folder, tmp_path / "b", "axes: {seeds: [2, 1, 0]}")
    assert ids(more)[1:] == ids(first)[::-1]
    moved = plan(store_folder, tmp_path / "a", head=HEAD | {"model": "/else"})
    assert ids(moved) == ids(first)[:1]
    logged = plan(store_folder, tmp_path / "a", log_every=3, keep_checkpoints=1, overlays=False)
    assert ids(logged) == ids(first)[:1]


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 1e-3}, {"data": {"draws": [0]}}, {"validation_pairs": 5}, {"seed": 1}],
)
def test_what_changes_a_result_changes_the_id(store_folder, tmp_path, change):
    assert ids(plan(store_folder, tmp_path, **change)) != ids(plan(store_folder, tmp_path))


def test_one_snapshot_stays_with_the_folder_whatever_is_committed_since(copied_store, tmp_path):
    records = list(copied_store.glob("*-*/commits/*train-00001*"))
    assert len(records) == 2
    for record in records:
        record.rename(tmp_path / record.parts[-3])
    first = plan(copied_store, tmp_path / "out")
    for record in records:
        (tmp_path / record.parts[-3]).rename(record)
    again = plan(copied_store, tmp_path / "out")
    assert again.snapshot == first.snapshot
    assert ids(again) == ids(first)
    fresh = plan(copied_store, tmp_path / "other")
    assert fresh.snapshot != first.snapshot
    assert ids(fresh) != ids(first)


def test_a_layer_that_comes_later_leaves_the_other_trials_their_ids(store_folder, tmp_path):
    latents = plan(store_folder, tmp_path, head={"name": "znet"})
    both = plan(store_folder, tmp_path, "axes: {head: [znet, probe]}")
    assert latents.snapshot != both.snapshot
    assert ids(both)[0] == ids(latents)[0]
    assert [t.reads_features for t in both.trials] == [False, True, False]


def test_a_folder_is_of_one_store(store_folder, copied_store, tmp_path):
    plan(store_folder, tmp_path / "out")
    with pytest.raises(SpecError, match=r"holds a sweep over .*give another --out"):
        plan(copied_store, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["store"] == str(store_folder)


def test_baselines_are_a_trial_a_choice_of_pairs(store_folder, tmp_path):
    text = "variants: [{name: a}, {name: b, validation_pairs: 3}]\naxes: {seeds: [0, 1]}"
    found = plan(store_folder, tmp_path, text).trials
    assert [trial.is_baselines for trial in found] == 4 * [False] + 2 * [True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axes: {blocks: {each: 5..7}}", r"blocks: \[5\] were not encoded in features-\w+, which "
         r"holds \[6, 7, 8, 9, 10\]"),
        ("axes: {draws: [[0], [1, 4]]}", r"draws: \[4\] were not encoded in features-\w+, which "
         r"stores 2 a pair, numbered from 0, at timesteps \(300, 400\)"),
        ("axes: {features: {int8: ffff}}", r"a features layer 'ffff', got features-"),
        ("variants: [{name: a, data: {train: 'no*'}}]", r"tasks 'no\*': expected at least one"),
        ("variants: [{name: a, data: {validation: '*train*'}}]", r"tasks match both train"),
        ("variants: [{name: a, data: {latents: aaaa}}]", r"not over aaaa"),
        ("axes: {head: [znet], blocks: {each: all}, draws: {each: all}}\nheat_map: true",
         "expected probes among the trials' heads"),
    ],
)  # fmt: skip
def test_what_the_store_lacks_is_said_before_the_first_trial(store_folder, tmp_path, text, message):
    with pytest.raises(SpecError, match=message):
        plan(store_folder, tmp_path, text)
    assert not (tmp_path / "trials").exists()


def test_all_of_a_layer_that_is_not_there_is_no_empty_sweep(copied_store, tmp_path):
    for layer in copied_store.glob("features-*"):
        layer.rename(tmp_path / layer.name)
    for axis in ("draws", "blocks"):
        with pytest.raises(SpecError, match="expected one features layer, got none"):
            plan(copied_store, tmp_path / "out", f"axes: {{{axis}: {{each: all}}}}")


def test_a_trial_knows_its_timesteps(store_folder, tmp_path):
    found = plan(store_folder, tmp_path, "axes: {draws: {each: all}}")
    assert [found.list_timesteps(trial) for trial in found.trials] == [(300,), (400,), None]
