"""Which configs go on with a run."""

import pytest

from pipeline.base.yaml import SpecError
from pipeline.read.choice import PairChoice
from pipeline.read.source import open_layers
from pipeline.runs.checkpoint import CheckpointRecord
from pipeline.runs.config import HeadConfig
from pipeline.runs.resume import check_resumable
from tests.support.train_runs import make


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
        ({"learning_rate": 1e-4}, "learning_rate was 0.001, is 0.0001"),
        ({"batch_size": 5, "seed": 1}, "batch_size was 4, is 5; seed was 0, is 1"),
        (
            {"data": {"train_filter": PairChoice(max_area=0.5)}},
            "data.train_filter.max_area was 1.0",
        ),
        ({"data": {"train": "a*"}}, r"data.train was \*train\*, is a\*\. Give"),
        ({"data": {"snapshot": "e"}}, "data.snapshot was d, is e"),
        ({"data": {"latents": "other"}}, "data.latents was latents-.*, is other"),
        ({"schedule": "plateau"}, "schedule was constant, is plateau"),
        ({"best_by": "AP"}, "best_by was IoU_FG, is AP"),
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


def test_what_does_not_is_free(record):
    free = {"accumulate": 2, "loader_workers": 4, "num_steps": 9, "validate_every": 7}
    free |= {"keep_checkpoints": 5, "trace_pairs": True, "gradient_checkpointing": True}
    check_resumable(make(**free), record())


@pytest.mark.parametrize(
    ("schedule", "change"),
    [("cosine", {"num_steps": 9}), ("plateau", {"validate_every": 7})],
)
def test_what_a_schedule_follows_from_is_bound(record, schedule, change):
    with pytest.raises(SpecError, match=f"{next(iter(change))} was"):
        check_resumable(make(schedule=schedule, **change), record(schedule=schedule))
