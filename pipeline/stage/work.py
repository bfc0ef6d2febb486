"""What goes into an encode stage and what comes out: settings, work items, outcomes."""

import secrets
from dataclasses import dataclass, field
from typing import Literal

from models.ldm.tuning import PLAIN, Tuning
from pipeline.base.outages import PATIENCE
from pipeline.corpus.tasks import Task
from pipeline.spec.layer import LayerSpec

Cause = Literal["task", "changed", "storage", "node"]
QUEUE_BYTES = 256 * 2**20
# Where a task's time goes, in this order. Each stage has threads or a device of its own, so that
# stages overlap and their times add up to more than the wall time.
STAGES = ("fetch", "decode", "vae", "text", "read", "unet", "write", "commit")


@dataclass(frozen=True, slots=True)
class EncodeConfig:
    """Settings of an encode stage: picklable, the same for every actor of a run."""

    store_url: str
    latents: LayerSpec
    features: LayerSpec | None
    batch: int  # views a VAE pass, prompts a text pass, (pair x draw) a UNet pass
    num_threads: int | None = None  # of torch on the CPU; None leaves torch's choice
    tuning: Tuning = PLAIN  # of VAE and UNet
    num_decoders: int = 1  # processes that decode images
    queue_bytes: int = QUEUE_BYTES  # at most in each queue within the stage
    run: str = field(default_factory=lambda: secrets.token_hex(8))  # tells its commits from others'
    stall_s: float | None = None  # a process without progress for so long is killed
    needs_gpu: bool = False  # a machine on which torch sees none is at fault
    patience_s: float = field(default_factory=lambda: PATIENCE.total_s)  # the command's


@dataclass(frozen=True, slots=True)
class WorkItem:
    """A task and which of its layers are to be encoded.

    ``latents`` is the committed generation, or None where the layer is to be encoded, then as
    generation ``next_latents``; the same for ``features``. Where the item ``renews`` a tar that
    changed, ``sha256`` (hex) is what the tar has now, if that is known; else the tar must have what
    the generation before it was made from.
    """

    task: Task
    latents: int | None
    features: int | None
    next_latents: int = 0
    next_features: int = 0
    renews: bool = False
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """How the encoding of one work item ended, small enough to travel as a Ray row.

    ``lost``: another run committed the task first. ``cause`` is what a failure says something of:
    the task itself; its tar, which ``changed`` since it was encoded; the ``storage``, which did not
    answer; or the ``node``, the machine that tried it, so that another may do it. ``again``: it
    failed, and will be tried again at the end of the queue.
    """

    task: str
    status: Literal["committed", "lost", "failed", "again"]
    num_pairs: int = 0
    num_samples: int = 0  # stored
    num_held: int = 0  # samples of the tar, stored or not, where this item encoded its latents
    num_set_aside: int = 0  # members of the tar, as ``num_held``
    num_bytes: int = 0  # written by this item, all layers
    elapsed_s: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)  # by stage, of STAGES
    rejects: dict[str, int] = field(default_factory=dict)  # by reason
    notes: dict[str, int] = field(default_factory=dict)  # by name, as in ``Accounting``
    error: str = ""
    cause: Cause = "task"
    node: str = ""  # the host that did it
    ray_node: str = ""  # that host's id in the Ray cluster
