"""What an encode run is to do, and what became of each task of it.

``prepare_encode`` resolves a spec and a corpus against a store; ``encode_stage`` does the work.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from models.tuning import PLAIN, Tuning
from pipeline.check_spec import check_spec
from pipeline.corpus import list_tasks, split_tasks
from pipeline.layers import build_layers
from pipeline.missing import WorkItem, list_missing
from pipeline.spec import LayerSpec, Spec
from pipeline.storage import check_create
from pipeline.store import Store
from pipeline.verify import Damage

QUEUE_BYTES = 256 * 2**20
"""Most of each of an encode stage's queues: of decoded views, of inputs and of results."""
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
class EncodeRun:
    """What a run will do: its config, the corpus' size, and what is missing."""

    config: EncodeConfig
    num_tasks: int
    items: tuple[WorkItem, ...]

    @property
    def num_done(self) -> int:
        """Tasks that were committed before."""
        return self.num_tasks - len(self.items)

    def describe(self) -> str:
        """Say it in a line a layer and one of counts."""
        layers = [self.config.latents, self.config.features]
        lines = [f"layer {layer.folder}" for layer in layers if layer is not None]
        counts = f"{self.num_tasks} tasks: {self.num_done} committed, {len(self.items)} to encode"
        return "\n".join([*lines, counts])


def prepare_encode(
    spec: Spec,
    patterns: Sequence[str],
    store_url: str,
    *,
    batch: int,
    stall_s: float | None = None,
    root: str | None = None,
    limit: int | None = None,
    split_bytes: int | None = None,
    tuning: Tuning = PLAIN,
    damage: Sequence[Damage] = (),
    where: str = "spec",
) -> EncodeRun:
    """Resolve a spec and a corpus against a store: make its layers, list what is missing.

    ``limit`` takes the first tars in URL order only. Tars over ``split_bytes`` are split; a latents
    layer that is there says so itself. ``damage`` is what ``verify`` found, to be encoded anew.
    ``where`` names the spec in errors.

    Raises:
        SpecError, ModelFilesError, CorpusError: one of the three is not what it must be.
        OSError: the store cannot be written, or is one where a record could have two writers.
    """
    folder = check_spec(spec, where=where)
    latents, features = build_layers(spec, folder=folder)
    tars = list_tasks(patterns, root=root)[:limit]
    store = Store.open(store_url)
    latents = store.adopt_split(latents, split_bytes=split_bytes)
    tasks = split_tasks(tars, latents.split_bytes)
    items = list_missing(store, latents, features, tasks, damage=damage)
    if items:
        check_create(store.storage)  # before anything is written
    for layer in (latents, features):
        if layer is not None:
            store.add_layer(layer)
    config = EncodeConfig(
        store.storage.url, latents, features, batch, tuning=tuning, stall_s=stall_s
    )
    return EncodeRun(config, len(tasks), tuple(items))
