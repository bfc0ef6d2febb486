"""What a run leaves behind, by the one worker that writes: checkpoints, logs and overlays."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.read.reader import PairReader
from pipeline.read.source import Source
from pipeline.runs.checkpoint import CheckpointRecord
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.config import TrainConfig
from pipeline.runs.state import collect_training
from pipeline.train.log import StepRecord, TrainLog
from pipeline.train.overlays import ValidationOverlays
from pipeline.train.step import TrainStep


class TrainOutputs:
    """Writes the records, pictures and checkpoints of a run under ``out``."""

    def __init__(
        self,
        config: TrainConfig,
        source: Source,
        out: Path,
        validation: PairReader,
        *,
        draw: int,
        first_step: int,
        device: torch.device,
    ) -> None:
        self._config, self._source, self._device = config, source, device
        self._overlays: ValidationOverlays | None = None
        if config.overlays:
            self._overlays = ValidationOverlays(config, source, validation, draw=draw)
        self._writer = CheckpointWriter(
            out, num_kept=config.keep_checkpoints, first_step=first_step
        )
        self._log = TrainLog(out, first_step=first_step)

    def add_step(self, record: StepRecord) -> None:
        """Write the figures of the steps since the last record."""
        self._log.add_step(record)

    def add_validation(self, num_done: int, figures: Mapping[str, float], step: TrainStep) -> None:
        """Write what a validation after so many steps found, and its overlays."""
        self._log.add_validation(num_done, figures)
        if self._overlays is not None:
            images, captions = self._overlays.draw(step.average, device=self._device)
            self._log.add_overlays(num_done, images, captions)

    def save(
        self,
        num_done: int,
        step: TrainStep,
        *,
        figures: Mapping[str, float],
        loop: dict[str, Any],
        best: bool,
    ) -> None:
        """Have a checkpoint written; ``figures`` are those of a validation at this step, or none.

        Raises:
            OSError: the one before it could not be written.
        """
        record = CheckpointRecord(
            step=num_done,
            store=self._source.store.storage.url,
            snapshot=self._source.snapshot.digest,
            latents=self._source.latents,
            features=self._source.features,
            train=self._config,
            validation=dict(figures),
            loop=loop,
        )
        training = collect_training(step.head, step.optimizer)
        self._writer.save(step.average, record, training, best=best)

    def check(self) -> None:
        """Raise what the last checkpoint's write ended with, if it did; call it at every step.

        Raises:
            OSError: it could not be written.
        """
        self._writer.check()

    def close(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            OSError: it could not be written.
        """
        self._log.close()
        self._writer.close()
