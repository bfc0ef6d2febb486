"""Resuming a run: whether a config may go on from a checkpoint, and from which one."""

import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.base.yaml import SpecError
from pipeline.runs.checkpoint import (
    CheckpointRecord,
    DamagedCheckpointError,
    find_resumable,
    list_checkpoints,
    read_record,
)
from pipeline.runs.config import TrainConfig
from pipeline.runs.step_folders import parse_step

SEE_S = 90.0  # an NFS client trusts what it knows of a folder for 60 s (nfs(5), acdirmax)
_POLL_S = 0.2
_NONE = -1
_SCORED = ("best_by", "data.validation", "data.validation_filter")  # what a score is of
FREE_FIELDS = (
    *("learning_rate", "warmup_steps", "schedule", "weight_decay", "clip_norm", "ema_decay"),
    *("num_steps", "precision", "accumulate", "gradient_checkpointing", "loader_workers"),
    *("trace_pairs", "log_every", "validate_every", "validation_pairs", "negatives", "overlays"),
    *("checkpoint_every", "keep_checkpoints", "head.model", *_SCORED),
)
"""Fields that may change with ``--resume``: on none of them depends which pairs a step trains on,
nor what the checkpoint's tensors are."""
_FREE = tuple(f"{field}." for field in FREE_FIELDS)  # also of what is below one


class Change(NamedTuple):
    """A field, by dotted path, that has another value than in the run so far."""

    field: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field} was {_show(self.was)}, is {_show(self.now)}"

    def tells_scores_apart(self, num: int) -> bool:
        """Whether scores from before and after it do not compare, over ``num`` pairs at most."""
        if self.field == "validation_pairs":
            return bool(min(self.was, num) != min(self.now, num))
        return self.field.startswith(_SCORED)


def check_resumable(config: TrainConfig, record: CheckpointRecord) -> list[Change]:
    """Check that a run may be resumed with this config; return which of ``FREE_FIELDS`` changed.

    Raises:
        SpecError: another field, which the head reads, has another value; lists old and new ones.
    """
    _, earlier = record.require_run()
    theirs, ours = (_list_values(c, record) for c in (earlier, config))
    if record.threshold is None and record.loop.get("best") is not None:  # of an older version
        theirs["best_by"] = {"AP": "AP_clipseg"}.get(theirs["best_by"], theirs["best_by"])
    unread = config.list_unread()
    if earlier.head.from_ is not None:
        unread |= {name for name in ours if name.startswith("head.from.")}  # it has its weights
    if config.data.order == "global":
        unread.add("data.window")
    changes = list_changes(theirs, ours, free=unread)
    free = [change for change in changes if f"{change.field}.".startswith(_FREE)]
    if bound := [str(change) for change in changes if change not in free]:
        raise SpecError(
            f"--resume: the checkpoint at step {record.step} was trained with another config: "
            f"{'; '.join(bound)}. Give the run's values, or another --out. With --resume may "
            f"change: {', '.join(FREE_FIELDS)}"
        )
    return free


def list_changes(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], *, free: Collection[str] = ()
) -> list[Change]:
    """Return each value of ``ours`` that differs, except for the ``free`` ones."""
    return [
        Change(name, theirs.get(name), ours[name])
        for name in ours
        if name not in free and ours[name] != theirs.get(name)
    ]


def _list_values(config: TrainConfig, record: CheckpointRecord) -> dict[str, Any]:
    """Return every value by dotted path; a layer's or snapshot's name is written out in full."""
    values = dict(_flatten(config.model_dump(mode="json")))
    if values["data.snapshot"] is None:  # then the run's own is read
        values["data.snapshot"] = record.snapshot
    for name, layer in (("data.latents", record.latents), ("data.features", record.features)):
        given = values[name]
        if layer is not None and (given is None or layer.folder.endswith(given)):
            values[name] = layer.folder
    return values


def _flatten(plain: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def find_resume_point(
    out: Path, *, resume: bool, rank: int, num_workers: int, device: torch.device
) -> tuple[Path, CheckpointRecord] | None:
    """Return the checkpoint to resume from and its record, or None; the same in every worker.

    Rank 0's ``resume`` decides, and rank 0 verifies all files; the others wait until their file
    system shows that checkpoint. With several workers, torch's process group must be initialised.

    Raises:
        SpecError: in rank 0: there is nothing to resume.
        RuntimeError: in another worker: the checkpoint did not appear in ``SEE_S``.
    """
    found = find_resumable(out) if resume and rank == 0 else None
    if num_workers == 1:
        return found
    broadcast = torch.tensor(found[1].step if found else _NONE, device=device)
    torch.distributed.broadcast(broadcast, 0)
    step = int(broadcast)
    if rank == 0 or step == _NONE:
        return found
    return _wait_for_step(out, step)


def _wait_for_step(out: Path, step: int) -> tuple[Path, CheckpointRecord]:
    until_s = time.monotonic() + SEE_S
    while (found := _find_whole(out, step)) is None:
        if time.monotonic() > until_s:
            raise RuntimeError(
                f"{out}: rank 0 goes on from step {step}, but no whole checkpoint of it appeared "
                f"here in {SEE_S:g} s; is it one folder that every node sees? If so, run it again"
            )
        time.sleep(_POLL_S)
    return found


def _find_whole(out: Path, step: int) -> tuple[Path, CheckpointRecord] | None:
    for path in list_checkpoints(out):
        if parse_step(path) != step:
            continue
        try:
            record = read_record(path)
            sizes = {name: (path / name).stat().st_size for name in record.files}
        except (DamagedCheckpointError, FileNotFoundError):  # not all files are visible yet
            return None
        whole = all(sizes[name] == expected.size for name, expected in record.files.items())
        return (path, record) if whole else None
    return None
