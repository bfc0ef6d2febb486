"""Prepares an encode run: creates a spec's layers in the store and lists what is missing there."""

from collections.abc import Sequence
from dataclasses import dataclass

from models.ldm.tuning import PLAIN, Tuning
from pipeline.corpus.tasks import list_tasks, split_tasks
from pipeline.encode.missing import list_missing
from pipeline.spec.build_layers import build_layers
from pipeline.spec.fields import Spec
from pipeline.stage.work import EncodeConfig, WorkItem
from pipeline.storage.open import check_create
from pipeline.store.store import Store
from pipeline.upkeep.verify import Damage


@dataclass(frozen=True, slots=True)
class EncodeRun:
    """What a run will do: its settings, the corpus' size, and what is missing of it."""

    config: EncodeConfig
    num_tasks: int
    items: tuple[WorkItem, ...]

    @property
    def num_done(self) -> int:
        """Tasks that were committed before."""
        return self.num_tasks - len(self.items)

    def describe(self) -> str:
        """Return a line a layer and one of counts."""
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
    """Check a spec and list a corpus; create the layers and list the tasks that they lack.

    Args:
        limit: takes only the first tars in URL order.
        split_bytes: longer tars are split; a latents layer that exists has its own value.
        damage: what ``verify`` found, to be encoded anew.
        where: names the spec in errors.

    Raises:
        SpecError, ModelFilesError, CorpusError: spec, model or corpus are not what they must be.
        OSError: the store cannot be written, or does not create files exclusively, so that a record
            could have two writers.
    """
    latents, features = build_layers(spec, where=where)
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
