"""Prepares an encode run: creates a spec's layers in the store and lists what is missing there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from models.ldm.tuning import PLAIN, Tuning
from pipeline.base.progress_text import count_noun
from pipeline.base.yaml import SpecError
from pipeline.corpus.tasks import Task, list_tasks
from pipeline.encode.missing import ChangedTars, CorpusWork, FailedTask, MissingWork
from pipeline.spec.build_layers import build_layers
from pipeline.spec.fields import Spec
from pipeline.spec.layer import LayerSpec
from pipeline.stage.work import EncodeConfig, WorkItem
from pipeline.storage.open import check_create
from pipeline.store.store import Store
from pipeline.upkeep.verify import Damage


@dataclass(frozen=True, slots=True)
class EncodeRun:
    """What a run will do: its settings, the corpus' size, and what is missing of it.

    While there are ``suspects``, tars of which only the marks are known to have changed, nothing
    else is known: have them hashed and go on with ``resolve``.
    """

    config: EncodeConfig
    work: CorpusWork
    missing: MissingWork

    @property
    def items(self) -> tuple[WorkItem, ...]:
        """The tasks that are to be encoded."""
        return self.missing.items

    @property
    def failed(self) -> tuple[FailedTask, ...]:
        """The tasks that cannot be encoded, which is known before the run."""
        return self.missing.failed

    @property
    def suspects(self) -> tuple[Task, ...]:
        """The tars to be hashed."""
        return self.missing.suspects

    @property
    def num_tasks(self) -> int:
        """Tasks of the corpus, without those that are retired."""
        return self.missing.num_tasks

    @property
    def num_done(self) -> int:
        """Tasks that were committed before."""
        return self.num_tasks - len(self.items) - len(self.failed)

    def resolve(self, digests: Mapping[str, str], unread: Mapping[str, str]) -> "EncodeRun":
        """Return the run after its suspects were hashed: SHA-256 and errors by URL."""
        run = replace(self, missing=self.work.list_missing(digests, unread))
        run.create_layers()
        return run

    def create_layers(self) -> None:
        """Create the layers where they are not there, once the work is known.

        Raises:
            OSError: the store cannot be written, or does not create files exclusively.
        """
        store = Store.open(self.config.store_url)
        if self.items:
            check_create(store.storage)  # before anything is written
        for layer in (self.config.latents, self.config.features):
            if layer is not None:
                store.add_layer(layer)

    def describe(self) -> str:
        """Return a line a layer and one of counts."""
        layers = [self.config.latents, self.config.features]
        lines = [f"layer {layer.folder}" for layer in layers if layer is not None]
        tasks = count_noun(self.num_tasks, "task")
        counts = f"{tasks}: {self.num_done} committed, {len(self.items)} to encode"
        num_changed = sum(outcome.cause == "changed" for _, outcome in self.failed)
        for num, what in (
            (sum(item.renews for item in self.items), "of them anew, as their tars changed"),
            (num_changed, "of tars that changed (see --changed)"),
            (len(self.failed) - num_changed, "that cannot be encoded"),
            (self.missing.num_retired, "retired and left alone"),
            (self.missing.num_kept, "of tars that changed, kept as they are"),
            (self.missing.num_empty, "of tars whose samples were all rejected"),
        ):
            counts += f", {num} {what}" if num else ""
        lines.append(counts)
        if self.missing.num_others:
            lines.append(
                f"the store has {count_noun(self.missing.num_others, 'task')} of other tars; where "
                "one was renamed or withdrawn: ldznet rm STORE --task"
            )
        return "\n".join(lines)


def prepare_encode(
    spec: Spec,
    patterns: Sequence[str] | None,
    store_url: str,
    *,
    batch: int,
    stall_s: float | None = None,
    root: str | None = None,
    limit: int | None = None,
    split_bytes: int | None = None,
    tuning: Tuning = PLAIN,
    damage: Sequence[Damage] = (),
    changed: ChangedTars = "fail",
    rehash: bool = False,
    where: str = "spec",
) -> EncodeRun:
    """Check a spec and list a corpus; create the layers and list the tasks that they lack.

    Args:
        patterns: of the tars; None for the tasks that the latents layer has, whose tars are not
            needed where only features are missing.
        limit: takes only the first tars in URL order.
        split_bytes: longer tars are split; a latents layer that exists has its own value.
        damage: what ``verify`` found, to be encoded anew.
        changed: what is done with tars that changed since they were encoded.
        rehash: every tar that was encoded before is a suspect, whatever its marks.
        where: names the spec in errors.

    Raises:
        SpecError, ModelFilesError, CorpusError: spec, model or corpus are not what they must be.
        OSError: the store cannot be written, or does not create files exclusively, so that a record
            could have two writers.
    """
    if patterns is None and (root or limit or split_bytes or rehash or changed != "fail"):
        raise SpecError(
            "--corpus: expected the tars that --root, --limit, --split-gb, --changed and --rehash "
            "are about, got none"
        )
    latents, features = build_layers(spec, where=where)
    tars = None if patterns is None else list_tasks(patterns, root=root)[:limit]
    store = Store.open(store_url)
    if tars is None:
        _check_has_layer(store, latents, features)
    latents = store.adopt_split(latents, split_bytes=split_bytes)
    work = CorpusWork(store, latents, features, tars, damage=damage, changed=changed)
    config = EncodeConfig(
        store.storage.url, latents, features, batch, tuning=tuning, stall_s=stall_s
    )
    run = EncodeRun(config, work, work.list_missing(rehash=rehash))
    if not run.suspects:
        run.create_layers()
    return run


def _check_has_layer(store: Store, latents: LayerSpec, features: LayerSpec | None) -> None:
    """Check that a run without a corpus has something to do.

    Raises:
        SpecError: it has not; says what is needed.
    """
    if features is None:
        raise SpecError(
            "--corpus: expected the tars to encode, got none; without it only features are "
            "encoded, over latents that are there, and the spec has no features section"
        )
    if all(layer.folder != latents.folder for layer in store.list_layers(required=True)):
        raise SpecError(
            f"--corpus: expected the tars to encode, got none; without it features are encoded "
            f"over latents that are there, and {store.storage.url} has no {latents.folder}"
        )
