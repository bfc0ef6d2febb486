"""The files of a training run, all written by rank 0: checkpoints, logs and overlays."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.read.source import Source
from pipeline.runs.checkpoint import CheckpointRecord
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.config import TrainConfig
from pipeline.runs.state import collect_training
from pipeline.train.log import TrainLog
from pipeline.train.overlays import ValidationOverlays
from pipeline.train.step import HeadTrainer
from pipeline.train.validation import Validation


class TrainOutputs:
    """Writes a run's ``log``, its overlays, and its checkpoints by ``writer``, under ``out``."""

    def __init__(
        self,
        config: TrainConfig,
        source: Source,
        out: Path,
        validation: Validation,
        first_step: int,
        device: torch.device,
    ) -> None:
        """Open them for a run that has made ``first_step`` steps."""
        self._config, self._source, self._device = config, source, device
        self._overlays: ValidationOverlays | None = None
        if config.overlays:
            self._overlays = ValidationOverlays(
                config, source, validation.reader, draw=validation.draw
            )
        self.writer = CheckpointWriter(out, num_kept=config.keep_checkpoints, first_step=first_step)
        self.log = TrainLog(out, first_step=first_step)

    def add_validation(self, step: int, figures: Mapping[str, float], trainer: HeadTrainer) -> None:
        """Log the figures of a validation after ``step`` steps, and draw its overlays."""
        self.log.add_validation(step, figures)
        if self._overlays is not None:
            images, captions = self._overlays.draw(
                trainer.average, device=self._device, threshold=figures["mIoU_threshold"]
            )
            self.log.add_overlays(step, images, captions)

    def save(
        self,
        step: int,
        trainer: HeadTrainer,
        *,
        figures: Mapping[str, float],  # of the last validation
        loop: dict[str, Any],
        best: bool,
    ) -> None:
        """Start to write a checkpoint; OSError where the one before it could not be written."""
        record = CheckpointRecord(
            step=step,
            store=self._source.store.storage.url,
            snapshot=self._source.snapshot.digest,
            latents=self._source.latents,
            features=self._source.features,
            train=self._config,
            validation=dict(figures),
            loop=loop,
        )
        training = collect_training(trainer.head, trainer.optimizer)
        self.writer.save(trainer.average, record, training, best=best)

    def close(self) -> None:
        """Close the log and wait for the last checkpoint; OSError if it could not be written."""
        self.log.close()
        self.writer.close()
