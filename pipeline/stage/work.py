"""Work items of the encode stage, its settings, and what became of an item."""

import secrets
from dataclasses import dataclass, field
from typing import Literal

from models.ldm.tuning import PLAIN, Tuning
from pipeline.corpus.tasks import Task
from pipeline.spec.layer import LayerSpec

QUEUE_BYTES = 256 * 2**20

# Where an item's time goes, in the order in which it passes them; each stage is a thread's or the
# device's own time, so that they overlap and a share over 1 of the wall time is possible.
STAGES = ("fetch", "decode", "vae", "text", "read", "unet", "write", "commit")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one work item, small enough to travel as a Ray row."""

    task: str
    status: Literal["committed", "lost", "failed"]
    num_pairs: int = 0
    num_samples: int = 0
    num_bytes: int = 0  # written by this item, all layers
    elapsed_s: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)  # by stage, of STAGES
    rejects: dict[str, int] = field(default_factory=dict)  # by reason
    error: str = ""


@dataclass(frozen=True, slots=True)
class EncodeConfig:
    """What an encode stage needs: picklable, the same for every actor."""

    store_url: str
    latents: LayerSpec
    features: LayerSpec | None
    batch: int  # views a VAE pass, prompts a text pass, (pair x draw) a UNet pass
    num_threads: int | None = None  # of torch on the CPU; None leaves torch's choice
    tuning: Tuning = PLAIN  # of VAE and UNet
    num_decoders: int = 1  # processes that decode images
    queue_bytes: int = QUEUE_BYTES  # of each queue within the stage
    run: str = field(default_factory=lambda: secrets.token_hex(8))  # tells its commits from others'
    stall_s: float | None = None  # without progress for so long the process is killed


@dataclass(frozen=True, slots=True)
class WorkItem:
    """A task and what is to be done of it.

    ``latents`` is the generation committed, None where it is to be encoded, then as generation
    ``next_latents``; the same for ``features``. ``fault`` is why nothing can be done, or "".
    """

    task: Task
    latents: int | None
    features: int | None
    next_latents: int = 0
    next_features: int = 0
    fault: str = ""
