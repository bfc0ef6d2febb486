"""Whether a config goes on with the run that left a checkpoint."""

from pipeline.checkpoint import CheckpointRecord
from pipeline.spec import SpecError
from pipeline.train_config import TrainConfig

_FREE = {  # neither the pairs of a step nor what is done with them depends on these
    *("num_steps", "accumulate", "gradient_checkpointing", "loader_workers", "trace_pairs"),
    *(
        "overlays",
        "log_every",
        "validate_every",
        "validation_pairs",
        "checkpoint_every",
        "keep_checkpoints",
    ),
}
_BOUND = {  # but for a schedule that follows from them
    "cosine": {"num_steps"},
    "plateau": {"validate_every", "validation_pairs"},
}


def check_resumable(config: TrainConfig, record: CheckpointRecord) -> None:
    """Check that a config goes on with a checkpoint's run.

    Raises:
        SpecError: another value than the run's of what changes its steps.
    """
    free = _FREE - _BOUND.get(config.schedule, set())
    _, earlier = record.require_run()
    ours, theirs = (c.model_dump(exclude=free) for c in (config, earlier))
    ours["head"].pop("model")
    theirs["head"].pop("model")
    changed = sorted(key for key in ours if ours[key] != theirs[key])
    if changed:
        raise SpecError(
            f"--resume: the checkpoint at step {record.step} was trained with another config: "
            f"{', '.join(changed)} differ; give its config, or another --out"
        )
