"""Which configs go on with a run."""

import pytest

from pipeline.check_resume import check_resumable
from pipeline.checkpoint import CheckpointRecord
from pipeline.spec import SpecError
from tests.train_runs import make, open_source


@pytest.fixture
def record(store_folder):
    source = open_source(store_folder)

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
    ("changes", "named"),
    [
        ({"learning_rate": 1e-4}, "learning_rate"),
        ({"batch_size": 5, "seed": 1}, "batch_size, seed"),
        ({"data": {"draws": (1,)}}, "data"),
        ({"schedule": "plateau"}, "schedule"),
        ({"best_by": "AP"}, "best_by"),
    ],
)
def test_what_changes_the_steps_is_refused(record, changes, named):
    with pytest.raises(SpecError, match=f"at step 3 was trained with another config: {named} diff"):
        check_resumable(make(**changes), record())


def test_what_does_not_is_free(record):
    free = {"accumulate": 2, "loader_workers": 4, "num_steps": 9, "validate_every": 7}
    free |= {"keep_checkpoints": 5, "trace_pairs": True, "gradient_checkpointing": True}
    check_resumable(make(**free), record())


@pytest.mark.parametrize(
    ("schedule", "change"),
    [("cosine", {"num_steps": 9}), ("plateau", {"validate_every": 7})],
)
def test_what_a_schedule_follows_from_is_bound(record, schedule, change):
    with pytest.raises(SpecError, match=f"{next(iter(change))} differ"):
        check_resumable(make(schedule=schedule, **change), record(schedule=schedule))
