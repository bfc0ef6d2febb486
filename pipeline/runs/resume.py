"""Whether a config goes on with the run that left a checkpoint."""

import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

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
from pipeline.runs.step_folders import find_step
from pipeline.spec.layer import LayerSpec

SEE_S = 90.0  # an NFS client trusts what it knows of a folder for 60 s (nfs(5), acdirmax)
_POLL_S = 0.2
_NONE = -1
_FREE = {  # neither the pairs of a step nor what is done with them depends on these
    *("num_steps", "accumulate", "gradient_checkpointing", "loader_workers", "trace_pairs"),
    *("overlays", "log_every", "validate_every", "validation_pairs"),
    *("checkpoint_every", "keep_checkpoints", "head.model"),
}
_BOUND = {  # but for a schedule that follows from them
    "cosine": {"num_steps"},
    "plateau": {"validate_every", "validation_pairs"},
}


def check_resumable(config: TrainConfig, record: CheckpointRecord) -> None:
    """Check that a config goes on with a checkpoint's run.

    What the head does not read may change; with other ``validation_pairs`` the loop forgets its
    best score.

    Raises:
        SpecError: another value than the run's of what changes its steps; lists old and new.
    """
    _, earlier = record.require_run()
    theirs, ours = (_list_values(c, record) for c in (earlier, config))
    free = (_FREE - _BOUND.get(config.schedule, set())) | config.list_unread()
    if config.data.order == "global":
        free.add("data.window")
    changed = list_changes(theirs, ours, free=free)
    if changed:
        raise SpecError(
            f"--resume: the checkpoint at step {record.step} was trained with another config: "
            f"{'; '.join(changed)}. Give the run's values, or another --out"
        )


def list_changes(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], *, free: Collection[str] = ()
) -> list[str]:
    """Say of each value of ``ours`` that is another what it was and is, but for the ``free``."""
    return [
        f"{name} was {_show(theirs.get(name))}, is {_show(ours[name])}"
        for name in ours
        if name not in free and ours[name] != theirs.get(name)
    ]


def _list_values(config: TrainConfig, record: CheckpointRecord) -> dict[str, Any]:
    """Return every value by dotted path; names of layers and snapshot as what they stand for."""
    values = dict(_flatten(config.model_dump(mode="json")))
    if values["data.snapshot"] is None:  # a resumed run reads its own
        values["data.snapshot"] = record.snapshot
    for name, layer in (("data.latents", record.latents), ("data.features", record.features)):
        values[name] = _find_folder(values[name], layer)
    return values


def _find_folder(name: str | None, layer: LayerSpec | None) -> str | None:
    """Return the folder of the run's layer where it is meant: by none, its end or all of it."""
    meant = layer is not None and (name is None or layer.folder.endswith(name))
    return layer.folder if layer is not None and meant else name


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
    """Return the checkpoint to go on from and its record, of one step in every worker, or None.

    Rank 0's ``resume`` counts. It checks every file whole; the others wait until they see them.
    With more than one worker, torch's process group must be initialised.

    Raises:
        SpecError: in rank 0: there is nothing to resume.
        RuntimeError: in another: the checkpoint does not appear.
    """
    found = find_resumable(out) if resume and rank == 0 else None
    if num_workers == 1:
        return found
    told = torch.tensor(found[1].step if found else _NONE, device=device)
    torch.distributed.broadcast(told, 0)
    step = int(told)
    if rank == 0 or step == _NONE:
        return found
    return _wait_for_step(out, step)


def _wait_for_step(out: Path, step: int) -> tuple[Path, CheckpointRecord]:
    until_s = time.monotonic() + SEE_S
    while (found := _look_for_step(out, step)) is None:
        if time.monotonic() > until_s:
            raise RuntimeError(
                f"{out}: rank 0 goes on from step {step}, but no whole checkpoint of it appeared "
                f"here in {SEE_S:g} s; is it one folder that every node sees? If so, run it again"
            )
        time.sleep(_POLL_S)
    return found


def _look_for_step(out: Path, step: int) -> tuple[Path, CheckpointRecord] | None:
    for path in list_checkpoints(out):
        if find_step(path) != step:
            continue
        try:
            record = read_record(path)
            sizes = {name: (path / name).stat().st_size for name in record.files}
        except (DamagedCheckpointError, FileNotFoundError):  # not all of it is seen yet
            return None
        whole = all(sizes[name] == expected.size for name, expected in record.files.items())
        return (path, record) if whole else None
    return None
