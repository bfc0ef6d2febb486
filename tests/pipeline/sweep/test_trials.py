"""A sweep's plan: checked against the store before the first trial, ids that stay."""

import pytest
import yaml

from pipeline.base.yaml import SpecError
from pipeline.runs.config import TrainConfig
from pipeline.store.commit import RecordName, write_commit
from pipeline.store.snapshot import create_snapshot
from pipeline.store.store import Store
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.trials import plan_sweep
from pipeline.train.run import open_run_layers

HEAD = {"name": "probe"}
BASE = {"head": HEAD, "num_steps": 2, "batch_size": 4, "validation_pairs": 4}


def plan(store_folder, out, text="", **changes):
    plain = yaml.safe_load(text) or {}
    config = SweepConfig.model_validate({"base": BASE | changes, **plain})
    return plan_sweep(config, str(store_folder), out)


def hide(records, folder):
    """Move a task's commits out of a store; put them back with ``commit``."""
    assert len(records) == 2
    for record in records:
        record.rename(folder / record.parts[-3])


def commit(records, folder):
    for record in records:
        (folder / record.parts[-3]).rename(record)


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
    hide(records, tmp_path)
    first = plan(copied_store, tmp_path / "out")
    commit(records, tmp_path)
    again = plan(copied_store, tmp_path / "out")
    assert again.snapshot == first.snapshot
    assert ids(again) == ids(first)
    fresh = plan(copied_store, tmp_path / "other")
    assert fresh.snapshot != first.snapshot
    assert ids(fresh) != ids(first)


def test_a_repair_is_read_and_leaves_the_trials_their_ids(copied_store, tmp_path):
    first = plan(copied_store, tmp_path)
    store, layer = Store.open(str(copied_store)), max(first.layers)
    commit = next(store.read_commits(layer))
    write_commit(store.storage, commit.restate("stored", generation=1))
    again = plan(copied_store, tmp_path)
    assert ids(again) == ids(first)
    assert again.snapshot.digest == first.snapshot.digest
    assert RecordName(commit.task, 1) in again.open_layers(again.trials[0]).snapshot.records[layer]


def test_a_layer_that_comes_later_leaves_the_other_trials_their_ids(copied_store, tmp_path):
    """Also where a task was committed between: it is the new layer's, which pairs leave out."""
    records = list(copied_store.glob("*-*/commits/*train-00001*"))
    hide(records, tmp_path)
    first = plan(copied_store, tmp_path / "out", head={"name": "znet"})
    commit(records, tmp_path)
    both = plan(copied_store, tmp_path / "out", "axes: {head: [znet, probe]}")
    assert ids(both)[0] == ids(first)[0]
    assert both.trials[-1].id == first.trials[-1].id  # the baselines
    (latents,) = first.snapshot.records
    assert both.snapshot.records[latents] == first.snapshot.records[latents]
    (features,) = set(both.snapshot.records) - {latents}
    assert len(both.snapshot.records[features]) == len(first.snapshot.records[latents]) + 1
    assert [t.reads_features for t in both.trials] == [False, True, False]
    assert plan(copied_store, tmp_path / "out").snapshot == both.snapshot


def test_a_snapshot_with_a_layer_more_is_that_of_both_at_once(store_folder, tmp_path):
    plan(store_folder, tmp_path, head={"name": "znet"})
    store = Store.open(str(store_folder))
    every = create_snapshot(store, [layer.folder for layer in store.list_layers()], write=False)
    assert plan(store_folder, tmp_path).snapshot == every


@pytest.mark.parametrize("reader", ["sweep", "head"])
def test_a_layer_that_a_given_snapshot_lacks_is_named(copied_store, tmp_path, reader):
    store = Store.open(str(copied_store))
    (latents,) = (layer.folder for layer in store.list_layers() if layer.kind == "latents")
    only = create_snapshot(store, [latents])
    data = {"snapshot": only.digest}
    config = TrainConfig.model_validate(BASE | {"data": data})
    start = {
        "sweep": lambda: plan(copied_store, tmp_path, data=data),
        "head": lambda: open_run_layers(config, str(copied_store), resume_from=None),
    }
    message = (
        f"data.snapshot: {only.digest} holds {latents}, without features-.* th.* {reader} reads"
    )
    with pytest.raises(SpecError, match=message):
        start[reader]()


def test_the_stores_layers_are_not_listed_once_a_trial(store_folder, tmp_path, monkeypatch):
    listed = []
    real = Store.list_layers
    monkeypatch.setattr(Store, "list_layers", lambda *a, **b: listed.append(1) or real(*a, **b))
    plan(store_folder, tmp_path)
    few = len(listed)
    found = plan(store_folder, tmp_path, f"axes: {{seeds: {list(range(20))}}}")
    assert len(ids(found)) == 20
    assert len(listed) == 2 * few


def test_each_trial_knows_its_validation_pairs(store_folder, tmp_path):
    text = "variants: [{name: all}, {name: four, validation_pairs: 4}, {name: half, data: "
    text += "{validation_filter: {keys_to: 0.5}}}]"
    found = plan(store_folder, tmp_path, text, validation_pairs=1000)
    every, four, half, *baselines = [trial.num_pairs for trial in found.trials]
    assert four == 4 < every == found.num_pairs
    assert 0 < half < every
    assert baselines == [every, four, half]


def test_baselines_are_a_trial_a_choice_of_pairs(store_folder, tmp_path):
    text = "variants: [{name: a}, {name: b, validation_pairs: 3}]\naxes: {seeds: [0, 1]}"
    found = plan(store_folder, tmp_path, text).trials
    assert [trial.is_baselines for trial in found] == 4 * [False] + 2 * [True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axes: {blocks: {each: 5..7}}", r"blocks: \[5\] were not encoded in features-\w+, which "
         r"holds \[6, 7, 8, 9, 10\]"),
        ("axes: {draws: [[0], [1, 4]]}", r"data\.draws: features-\w+ stores 2 draws a pair, "
         r"numbered from 0, got \[1, 4\]; choose among \[0, 1\]"),
        ("axes: {features: {int8: ffff}}", r"a features layer 'ffff', got features-"),
        ("variants: [{name: a, data: {train: 'no*'}}]", r"data.train: 'no\*': no task of"),
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
