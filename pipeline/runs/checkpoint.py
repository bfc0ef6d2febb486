"""Checkpoints of a training run: finding, verifying and reading them.

``OUT/checkpoints/step-000500/`` holds the averaged head that is evaluated (``config.json``,
``model.safetensors``), ``training.safetensors`` (raw weights and optimizer state) and, written
last, ``ldznet.json`` (layers, snapshot, training config, scores, and size and SHA-256 of the other
files). ``OUT/best`` links to the one with the best score. ``checkpoint_writer`` writes them.
"""

import hashlib
import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from models.heads.registry import load_head
from pipeline.base.yaml import FrozenModel, SpecError, validate
from pipeline.read.source import Source, open_layers
from pipeline.runs.config import TrainConfig
from pipeline.runs.step_folders import follow, list_step_folders, read_steady
from pipeline.spec.layer import LayerSpec
from pipeline.store.store import Store

if TYPE_CHECKING:  # else a record could not be read without the seconds that torch takes
    from models.heads.head import Head

logger = logging.getLogger(__name__)

LDM_FOLDER = "ldm"  # of a converted checkpoint: the model that its head needs
RECORD = "ldznet.json"
CHECKPOINTS = "checkpoints"  # under OUT
TRAINING = "training.safetensors"
MODEL = "model.safetensors"
BEST = "best"  # the link's name


class DamagedCheckpointError(SpecError):
    """A file of a checkpoint is missing or differs from what the checkpoint's record says."""


class FileSum(FrozenModel):
    """Size and digest of a checkpoint's file."""

    size: int  # bytes
    sha256: str


class Conversion(FrozenModel):
    """The file of another program that a head was converted from."""

    file: str  # its name
    sha256: str


class CheckpointRecord(FrozenModel):
    """``ldznet.json``: what a head reads, and what it was trained on or converted from."""

    schema_version: int = 1
    step: int  # optimizer steps; 0 for a converted head
    store: str | None = None  # these three are given for a trained head and not for a converted one
    snapshot: str | None = None
    train: TrainConfig | None = None
    converted: Conversion | None = None
    latents: LayerSpec
    features: LayerSpec | None
    validation: dict[str, float] = Field(default_factory=dict)  # the run's last until this step
    best: bool = False  # the best score of the run when it was written
    loop: dict[str, Any] = Field(default_factory=dict)  # JSON-able state of the training loop
    files: dict[str, FileSum] = Field(default_factory=dict)  # older versions wrote none

    @model_validator(mode="after")
    def _trained_or_converted(self) -> "CheckpointRecord":
        given = [value is not None for value in (self.store, self.snapshot, self.train)]
        if any(given) == (self.converted is not None) or any(given) != all(given):
            raise ValueError(
                "a head must have store, snapshot and train, or else converted: the file was "
                "edited or damaged"
            )
        return self

    @property
    def threshold(self) -> float | None:
        """The threshold of the last validation's best mIoU; None of a head without one.

        A converted head has none, nor has a run before its first validation, nor a checkpoint of
        an older version.
        """
        return self.validation.get("mIoU_threshold")

    def require_run(self) -> tuple[str, TrainConfig]:
        """Return snapshot and config of the head's training run; SpecError for a converted head."""
        if self.snapshot is None or self.train is None:
            assert self.converted is not None
            raise SpecError(
                f"the head was converted from {self.converted.file}, which leaves no training to "
                "go on with; give the --out of a training run"
            )
        return self.snapshot, self.train

    def open_layers(self, store: Store | str, snapshot: str, *, out: Path | None = None) -> Source:
        """Open the layers that the head reads; ``snapshot`` and ``out`` as of ``open_layers``."""
        return open_layers(
            store,
            latents=self.latents.folder,
            features=self.features.folder if self.features else None,
            reads_features=self.features is not None,
            snapshot=snapshot,
            out=out,
        )


def write_record(folder: Path, record: CheckpointRecord) -> None:
    """Write ``ldznet.json`` into a checkpoint's folder."""
    (folder / RECORD).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")


def list_checkpoints(out: Path) -> list[Path]:
    """Return a run's checkpoint folders, oldest first."""
    return list_step_folders(out / CHECKPOINTS)


def find_best(out: Path) -> Path | None:
    """Return what ``OUT/best`` links to; without a link, the newest checkpoint that was the best.

    None where there is none. A file system without symbolic links has no link.
    """
    place = out / BEST
    if place.is_symlink():
        return place.resolve()
    for folder in reversed(list_checkpoints(out)):
        try:
            if read_record(folder).best:
                return folder
        except DamagedCheckpointError as error:
            logger.warning("%s; it is not taken for the best", error)
    return None


def find_checkpoint(folder: Path) -> Path:
    """Return ``folder`` if it is a checkpoint, or the newest checkpoint of a run's ``--out``.

    ``OUT/best`` is the best checkpoint also where no link could be made; of a link, what it leads
    to now is returned, which stays the same where the link is replaced.

    Raises:
        SpecError: it is neither.
    """
    return read_steady(partial(follow, folder), partial(_find_checkpoint, folder))


def _find_checkpoint(folder: Path, place: Path) -> Path:
    if (place / RECORD).is_file():
        return place
    if folder.name == BEST and not folder.exists() and (best := find_best(folder.parent)):
        return best
    found = list_checkpoints(folder)
    if not found:
        raise SpecError(
            f"{folder}: expected a checkpoint (a folder with {RECORD}) or the --out of a training "
            "run that saved one, got neither"
        )
    return found[-1]


def find_resumable(out: Path) -> tuple[Path, CheckpointRecord]:
    """Return a run's newest undamaged checkpoint, with every file verified, and its record.

    Newer ones that are damaged, as by a loss of power, are logged and passed over.

    Raises:
        SpecError: there is no checkpoint, or each is damaged.
    """
    find_checkpoint(out)
    for path in reversed(list_checkpoints(out)):
        try:
            record = read_record(path)
            verify_files(path, record)
        except DamagedCheckpointError as error:
            logger.warning("%s; going on from the checkpoint before it", error)
            continue
        return path, record
    raise SpecError(
        f"{out}: every checkpoint is damaged, so there is nothing to resume; train afresh with "
        "another --out"
    )


def read_record(path: Path) -> CheckpointRecord:
    """Read a checkpoint's record.

    Raises:
        DamagedCheckpointError: it is missing or is not JSON.
        SpecError: this version does not know such a record.
    """
    return read_steady(partial(follow, path), _read_record)


def _read_record(path: Path) -> CheckpointRecord:
    try:
        plain: Any = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise DamagedCheckpointError(f"{path / RECORD}: expected JSON, got {error}") from error
    return validate(plain, CheckpointRecord, where=str(path / RECORD))


def verify_files(path: Path, record: CheckpointRecord, *names: str) -> None:
    """Verify the named files of a checkpoint, by default all, against its record.

    Records of older versions list no files: then nothing is verified.

    Raises:
        DamagedCheckpointError: a file is missing, or its size or digest is another.
    """
    for name in names or record.files:
        expected = record.files.get(name)
        if expected is not None and (found := sum_file(path / name)) != expected:
            got = f"{found.size} bytes, SHA-256 {found.sha256[:12]}…" if found else "no file"
            raise DamagedCheckpointError(
                f"{path / name}: expected {expected.size} bytes, SHA-256 "
                f"{expected.sha256[:12]}…, got {got}: the checkpoint is damaged"
            )


def sum_file(path: Path) -> FileSum | None:
    """Return a file's size and SHA-256, or None if there is no file."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return FileSum(size=file.tell(), sha256=digest)
    except FileNotFoundError:
        return None


def load_checkpoint(folder: Path) -> "tuple[Head, CheckpointRecord]":
    """Read a checkpoint's averaged head, on the CPU and in evaluation mode, and its record.

    A run may write, replace and prune checkpoints meanwhile: the head is of one of them.

    Raises:
        SpecError: there is no checkpoint; DamagedCheckpointError if the head's files are damaged.
    """
    return read_steady(partial(find_checkpoint, folder), _load_checkpoint)


def _load_checkpoint(path: Path) -> "tuple[Head, CheckpointRecord]":
    record = read_record(path)
    verify_files(path, record, "config.json", MODEL)
    return load_head(path).eval(), record
