"""Which checkpoint the workers of a run go on from: rank 0 finds it and tells the others.

A file server shows a folder's new entries to some nodes later than to others. Whoever looked by
itself could miss the newest checkpoint that rank 0 goes on from.
"""

import time
from pathlib import Path

import torch

from pipeline.checkpoint import (
    CheckpointRecord,
    DamagedCheckpointError,
    find_resumable,
    list_checkpoints,
    read_record,
)
from pipeline.step_folders import find_step

SEE_S = 90.0  # an NFS client trusts what it knows of a folder for 60 s (nfs(5), acdirmax)
_POLL_S = 0.2
_NONE = -1


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
