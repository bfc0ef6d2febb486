"""The log of a training run: ``metrics.jsonl``, TensorBoard's event files, overlays as PNG.

A resumed run first removes what was logged after its checkpoint, so that the records are those of
an undisturbed run.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

from pipeline.base.progress import open_lines
from pipeline.base.whole_file import open_whole
from pipeline.train.overlays import draw_sheet

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
OVERLAYS = "overlays"
FLUSH_S = 10  # TensorBoard may lack so much after a kill; metrics.jsonl lacks nothing
_OVERLAY = re.compile(r"step-(\d{6,})\.png")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A line of ``metrics.jsonl``, one each ``log_every`` steps."""

    step: int
    loss: float  # mean over the global batch, averaged over the steps since the last record
    learning_rate: float
    grad_norm: float  # before clipping
    pairs_per_s: float
    data_wait: float  # share of the time spent waiting for batches


class TrainLog:
    """Writes the log; rank 0 has it. Records must be added in the order of steps."""

    def __init__(self, out: Path, *, first_step: int) -> None:
        """Open the log of a run that has made ``first_step`` steps."""
        self._out = out
        out.mkdir(parents=True, exist_ok=True)
        remove_later_records(out / METRICS, first_step)
        for path in (out / OVERLAYS).glob("step-*.png"):
            match = _OVERLAY.fullmatch(path.name)
            if match and int(match[1]) > first_step:
                path.unlink()
        self._lines = open_lines(out / METRICS)
        self._events = SummaryWriter(
            str(out / TENSORBOARD),
            purge_step=first_step + 1,
            flush_secs=FLUSH_S,
            filename_suffix=f".{first_step:09d}",  # files of one second would share a name
        )

    def add_step(self, record: StepRecord) -> None:
        """Add the figures of the steps since the last record."""
        figures = asdict(record)
        self._write(figures)
        del figures["step"]
        for name, value in figures.items():
            self._events.add_scalar(f"train/{name}", value, record.step)

    def add_validation(self, step: int, figures: Mapping[str, float]) -> None:
        """Add the figures of a validation after ``step`` steps."""
        self._write({"step": step, "validation": dict(figures)})
        for name, value in figures.items():
            self._events.add_scalar(f"validation/{name}", value, step)

    def add_overlays(self, step: int, images_NHWC: np.ndarray, captions: Sequence[str]) -> None:
        """Add pictures (N, H, W, 3) uint8, each with its caption, as ``overlays/step-N.png``."""
        sheet = draw_sheet(images_NHWC, captions)
        with open_whole(self._out / OVERLAYS / f"step-{step:06d}.png") as file:
            Image.fromarray(sheet).save(file, "png")
        self._events.add_image("validation/overlays", sheet, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the files."""
        self._lines.close()
        self._events.close()

    def _write(self, record: Mapping[str, object]) -> None:
        self._lines.write(json.dumps(record).encode() + b"\n")


def read_steps(data: bytes) -> list[tuple[int | None, bytes]]:
    """Return (step, line) of each undamaged line of ``metrics.jsonl``.

    The step is None for a line of the command's progress, which goes into the same file.
    """
    found = []
    for line in data.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:  # cut by a kill, or mixed by two writers of a file on NFS
            continue
        if line.endswith(b"\n") and isinstance(record, dict):
            found.append((None if "verb" in record else record.get("step"), line))
    return found


def remove_later_records(path: Path, first_step: int) -> None:
    """Remove damaged lines and the records of steps after ``first_step`` from a log.

    The file is truncated and not replaced, because the command has it open to append to.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    kept = [line for step, line in read_steps(data) if step is None or step <= first_step]
    wanted = b"".join(kept)
    if wanted == data:
        return
    same = 0
    for line in kept:  # lines that stay in place are safe from a kill before the write below
        if data[same : same + len(line)] != line:
            break
        same += len(line)
    logger.info("%s: records past step %d are taken back", path, first_step)
    with path.open("ab", buffering=0) as file:
        file.truncate(same)
        file.write(wanted[same:])
