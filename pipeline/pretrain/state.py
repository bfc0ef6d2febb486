"""Checkpoints of a pretraining stage: averaged weights, raw weights, optimizer state, a record.

``OUT/<stage>/step-000200/`` is written beside its place and renamed, so that it is whole or not
there (``step_folders``). The newest two are kept.
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
_AVERAGE, _WEIGHTS, _RECORD = "average.safetensors", "training.safetensors", "record.json"


def list_states(folder: Path) -> list[Path]:
    """The checkpoints in a stage's folder, oldest first."""
    return list_step_folders(folder)


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
        save_file(_contiguous(average.state_dict()), new / _AVERAGE)
        save_file(_contiguous(collect_training(model, optimizer)), new / _WEIGHTS)
        (new / _RECORD).write_text(json.dumps(record | {"step": step}, indent=1) + "\n")
    for old in list_states(folder)[:-_KEPT]:
        remove_folder(old)
    return path


def read_record(path: Path) -> dict[str, Any]:
    """A checkpoint's record: its step and what the stage keeps.

    Raises:
        SpecError: it cannot be read.
    """
    try:
        record: dict[str, Any] = json.loads((path / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: is no checkpoint of a pretraining stage: {error}") from error
    return record


def load_average(path: Path, average: nn.Module) -> None:
    """Put a checkpoint's averaged weights into a model."""
    average.load_state_dict(load_file(path / _AVERAGE))


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's raw weights and optimizer state back."""
    restore_training(model, optimizer, load_file(path / _WEIGHTS))


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in tensors.items()}
