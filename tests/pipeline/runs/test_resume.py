"""Which configs go on with a run."""

import pytest

from pipeline.base.yaml import SpecError
from pipeline.read.choice import PairChoice
from pipeline.read.source import open_layers
from pipeline.runs.checkpoint import CheckpointRecord
from pipeline.runs.config import DataConfig, HeadConfig, TrainConfig
from pipeline.runs.resume import FREE_FIELDS, Change, check_resumable
from tests.support.train_runs import ROOT, make


@pytest.fixture
def record(store_folder):
    source = open_layers(str(store_folder))

    def make_(**changes):
        return CheckpointRecord(
            step=3,
            store="s",
            snapshot="d",
            latents=source.latents,
            features=source.features,
            train=make(**changes),
        )

    return make_


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 5, "seed": 1}, "batch_size was 4, is 5; seed was 0, is 1"),
        (
            {"data": {"train_filter": PairChoice(max_area=0.5)}},
            "data.train_filter.max_area was 1.0",
        ),
        ({"data": {"train": "a*"}}, r"data.train was \*train\*, is a\*\. Give"),
        ({"data": {"snapshot": "e"}}, "data.snapshot was d, is e"),
        ({"data": {"latents": "other"}}, "data.latents was latents-.*, is other"),
        ({"data": {"views": "one"}, "learning_rate": 1e-4}, "data.views was every, is one. Give"),
    ],
)
def test_what_changes_the_steps_is_refused_with_its_values(record, changes, said):
    with pytest.raises(SpecError, match=f"at step 3 was trained with another config: {said}"):
        check_resumable(make(**changes), record())


def test_what_the_head_does_not_read_is_free(record):
    unread = {"fusion": "concatenation", "width": 8, "blocks": (7,)}
    data = {"draws": (1,), "window": 3}
    check_resumable(make(head=HeadConfig(name="znet", **unread), data=data), record())
    for name, field in (("ldznet", "fusion"), ("probe", "width"), ("probe", "blocks")):
        other = HeadConfig(name=name, **{field: unread[field]})
        with pytest.raises(SpecError, match=rf"config: head\.{field} was"):
            check_resumable(make(head=other), record(head=name))
    with pytest.raises(SpecError, match=r"config: data\.draws was null, is \[1\]"):
        check_resumable(make(head="probe", data={"draws": (1,)}), record(head="probe"))


def test_the_runs_own_layers_and_snapshot_may_be_named(record):
    data = {"snapshot": "d", "latents": record().latents.folder}
    check_resumable(make(data=data), record())
    check_resumable(make(), record(data=data))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "plateau"])
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"learning_rate": 1e-4}, ["learning_rate was 0.001, is 0.0001"]),
        (
            {"warmup_steps": 2, "clip_norm": 0.5, "weight_decay": 0.0, "ema_decay": 0.9},
            [
                *("warmup_steps was 0, is 2", "weight_decay was 0.01, is 0.0"),
                *("clip_norm was 1.0, is 0.5", "ema_decay was 0.5, is 0.9"),
            ],
        ),
        (
            {"num_steps": 9, "accumulate": 2, "precision": "bfloat16"},
            ["num_steps was 6, is 9", "accumulate was 1, is 2", "precision was auto, is bfloat16"],
        ),
        (
            {"validate_every": 7, "best_by": "AP"},
            ["validate_every was 3, is 7", "best_by was IoU_FG, is AP"],
        ),
        (
            {"data": {"validation_filter": PairChoice(max_area=0.5)}},
            ["data.validation_filter.max_area was 1.0, is 0.5"],
        ),
    ],
)
def test_what_may_change_is_told(record, schedule, changes, found):
    config = make(schedule=schedule, **changes)
    assert [str(x) for x in check_resumable(config, record(schedule=schedule))] == found


def test_the_schedule_may_change(record):
    changes = check_resumable(make(schedule="plateau"), record())
    assert changes == [("schedule", "constant", "plateau")]


def test_what_may_change_are_fields_of_a_config_and_the_reference_names_them():
    names = {f"data.{name}" for name in DataConfig.model_fields} | {"head.model"}
    assert set(FREE_FIELDS) <= TrainConfig.model_fields.keys() | names
    reference = (ROOT / "docs/reference/train-config.md").read_text()
    said = reference[reference.index("With `--resume`") : reference.index("## Files")]
    assert [name for name in FREE_FIELDS if f"`{name}`" not in said] == []


@pytest.mark.parametrize(
    ("change", "apart"),
    [
        (("validation_pairs", 4, 8), True),
        (("validation_pairs", 20, 30), False),  # of 12 that there are
        (("data.validation_filter.max_area", 1.0, 0.5), True),
        (("best_by", "AP", "mIoU"), True),
        (("validate_every", 4, 8), False),
    ],
)
def test_which_scores_do_not_compare(change, apart):
    assert Change(*change).tells_scores_apart(12) == apart
