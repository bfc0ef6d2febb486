"""Checkpoints of a pretraining stage: averaged weights, raw weights, optimizer state, a record.

``OUT/<stage>/step-000200/`` is written beside its place and renamed, so that it is whole or not
there. The newest two are kept.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.new_folder import write_new_folder
from pipeline.spec import SpecError

_KEPT = 2
_AVERAGE, _WEIGHTS, _RECORD = "average.safetensors", "training.safetensors", "record.json"


def list_states(folder: Path) -> list[Path]:
    """The checkpoints in a stage's folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


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
    path = folder / f"step-{step:06d}"
    if path.exists():  # of the same run, before it was resumed from an earlier one
        shutil.rmtree(path)
    with write_new_folder(path) as new:
        save_file(_contiguous(average.state_dict()), new / _AVERAGE)
        save_file(_collect(model, optimizer), new / _WEIGHTS)
        (new / _RECORD).write_text(json.dumps(record | {"step": step}, indent=1) + "\n")
    for old in list_states(folder)[:-_KEPT]:
        shutil.rmtree(old)
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
    weights: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(path / _WEIGHTS).items():
        kind, _, rest = name.partition("/")
        if kind == "weights":
            weights[rest] = value
        else:
            key, _, parameter = rest.partition("/")
            states.setdefault(parameter, {})[key] = value
    model.load_state_dict(weights)
    for path_in_model, weight in model.named_parameters():
        if path_in_model in states:
            optimizer.state[weight] = {
                key: value if key == "step" else value.to(weight.device)
                for key, value in states[path_in_model].items()
            }


def _collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"weights/{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
    return _contiguous(tensors)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in tensors.items()}
