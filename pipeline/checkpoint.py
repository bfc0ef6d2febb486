"""Checkpoints of a training run: a head with what it needs to be used, and how to go on.

``OUT/checkpoints/step-000500/`` holds the head that is evaluated (``config.json``,
``model.safetensors``: the averaged weights), ``ldznet.json`` (layers, snapshot, training config,
figures) and ``training.safetensors`` (raw weights and optimizer state). A folder is written beside
its place and renamed, so that a killed run leaves whole checkpoints only.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.head import Head
from models.heads import load_head
from pipeline.local_storage import sync_folder
from pipeline.spec import LayerSpec, SpecError, validate
from pipeline.train_config import TrainConfig

RECORD = "ldznet.json"
TRAINING = "training.safetensors"
NUM_KEPT = 2
_NAME = re.compile(r"^step-(\d{6,})$")


class Conversion(BaseModel):
    """The file of another program that a head was converted from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str  # its name
    sha256: str


class CheckpointRecord(BaseModel):
    """``ldznet.json``: what a head reads, and what it was trained on or converted from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    step: int  # optimizer steps made here: 0 where it was converted
    store: str | None = None  # these three of a head trained here, none of a converted one
    snapshot: str | None = None
    train: TrainConfig | None = None
    converted: Conversion | None = None
    latents: LayerSpec
    features: LayerSpec | None
    validation: dict[str, float] = {}

    @model_validator(mode="after")
    def _trained_or_converted(self) -> "CheckpointRecord":
        given = [value is not None for value in (self.store, self.snapshot, self.train)]
        if any(given) == (self.converted is not None) or any(given) != all(given):
            raise ValueError(
                "a head must have store, snapshot and train, or else converted: the file was "
                "edited or damaged"
            )
        return self

    def require_run(self) -> tuple[str, TrainConfig]:
        """Return the snapshot and the config of the run that trained the head.

        Raises:
            SpecError: the head was converted, so that there is no run to go on with.
        """
        if self.snapshot is None or self.train is None:
            assert self.converted is not None
            raise SpecError(
                f"the head was converted from {self.converted.file}, which leaves no training to "
                "go on with; give the --out of a training run"
            )
        return self.snapshot, self.train


@dataclass(frozen=True)
class TrainingState:
    """Tensors by name: the raw weights, and the optimizer's state a parameter."""

    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]


def save_checkpoint(
    out: Path, head: Head, record: CheckpointRecord, training: TrainingState
) -> Path:
    """Write a checkpoint whole, then drop all but the newest ``NUM_KEPT``."""
    folder = out / "checkpoints" / f"step-{record.step:06d}"
    for left in folder.parent.glob(".step-*"):  # of a run that was killed while it saved
        shutil.rmtree(left)
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    head.save_pretrained(temporary)
    write_record(temporary, record)
    flat = {f"weights/{name}": value for name, value in training.weights.items()}
    for name, state in training.optimizer.items():
        flat |= {f"optimizer/{key}/{name}": value for key, value in state.items()}
    save_file({k: v.detach().cpu().contiguous() for k, v in flat.items()}, temporary / TRAINING)
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    sync_folder(temporary)
    temporary.rename(folder)
    sync_folder(folder.parent)
    for old in list_checkpoints(out)[:-NUM_KEPT]:
        shutil.rmtree(old)
    return folder


def write_record(folder: Path, record: CheckpointRecord) -> None:
    """Write ``ldznet.json`` into a checkpoint's folder."""
    (folder / RECORD).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")


def list_checkpoints(out: Path) -> list[Path]:
    """Return a run's checkpoint folders, oldest first."""
    found = (out / "checkpoints").glob("step-*")
    return sorted((p for p in found if _NAME.match(p.name)), key=lambda p: int(p.name[5:]))


def find_checkpoint(folder: Path) -> Path:
    """Return ``folder`` if it is a checkpoint, or the newest checkpoint of a run's ``--out``.

    Raises:
        SpecError: neither.
    """
    if (folder / RECORD).is_file():
        return folder
    found = list_checkpoints(folder)
    if not found:
        raise SpecError(
            f"{folder}: expected a checkpoint (a folder with {RECORD}) or the --out of a training "
            "run that saved one, got neither"
        )
    return found[-1]


def load_checkpoint(folder: Path) -> tuple[Head, CheckpointRecord]:
    """Read a checkpoint's head (on the CPU) and its record."""
    path = find_checkpoint(folder)
    text = (path / RECORD).read_text(encoding="utf-8")
    try:
        plain: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise SpecError(f"{path / RECORD}: is not JSON: {error}") from error
    record = validate(plain, CheckpointRecord, where=str(path / RECORD))
    return load_head(path).eval(), record


def load_training(folder: Path) -> TrainingState:
    """Read what a run needs to go on."""
    weights: dict[str, Tensor] = {}
    optimizer: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(folder / TRAINING).items():
        kind, _, rest = name.partition("/")
        if kind == "weights":
            weights[rest] = value
        else:
            key, _, parameter = rest.partition("/")
            optimizer.setdefault(parameter, {})[key] = value
    return TrainingState(weights, optimizer)


def collect_training(head: torch.nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Return a head's raw weights and its optimizer's state by parameter name."""
    states = {
        name: {key: torch.as_tensor(value) for key, value in optimizer.state[parameter].items()}
        for name, parameter in head.named_parameters()
        if parameter in optimizer.state
    }
    return TrainingState(dict(head.state_dict()), states)


def restore_training(
    head: torch.nn.Module, optimizer: torch.optim.Optimizer, training: TrainingState
) -> None:
    """Put a saved state back into a head and its optimizer."""
    head.load_state_dict(training.weights)
    for name, parameter in head.named_parameters():
        if name in training.optimizer:
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if key != "step" else value
                for key, value in training.optimizer[name].items()
            }
