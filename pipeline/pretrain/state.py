"""Checkpoints of a pretraining stage: averaged weights, raw weights, optimizer state, a record.

``OUT/<stage>/step-000200/`` is written beside its place and renamed, so that it is whole or not
there. The newest two are kept.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.base.yaml import SpecError
from pipeline.runs.state import collect_training, restore_training
from pipeline.runs.step_folders import list_step_folders, name_step, remove_folder, replace_folder

_KEPT = 2
_AVERAGE, _TRAINING, _RECORD = "average.safetensors", "training.safetensors", "record.json"


def find_last_state(folder: Path) -> Path | None:
    """Return the newest checkpoint in a stage's folder, or None."""
    return next(reversed(list_step_folders(folder)), None)


def save_state(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    record: dict[str, Any],
) -> Path:
    """Write a checkpoint and remove all but the newest two."""
    path = folder / name_step(step)
    with replace_folder(path) as new:
        _save_tensors(average.state_dict(), new / _AVERAGE)
        _save_tensors(collect_training(model, optimizer), new / _TRAINING)
        (new / _RECORD).write_text(json.dumps(record | {"step": step}, indent=1) + "\n")
    for old in list_step_folders(folder)[:-_KEPT]:
        remove_folder(old)
    return path


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)


def read_record(path: Path) -> dict[str, Any]:
    """Read a checkpoint's record: its step and what the stage keeps.

    Raises:
        SpecError: it cannot be read.
    """
    try:
        record: dict[str, Any] = json.loads((path / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: is no checkpoint of a pretraining stage: {error}") from error
    return record


def load_average(path: Path, average: nn.Module) -> None:
    """Load a checkpoint's averaged weights into a model."""
    average.load_state_dict(load_file(path / _AVERAGE))


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint's raw weights and optimizer state."""
    restore_training(model, optimizer, load_file(path / _TRAINING))
