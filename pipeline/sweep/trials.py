"""The trials of a sweep over a store: checked before the first one starts, named by what they are.

Data flow: a sweep's file -> the layers that it names -> one snapshot of them for all trials, kept
in ``OUT/sweep.json`` -> the axes crossed over what the layers hold -> each trial's id: a digest of
its config, its layers and the commits that it reads. Another run with the same OUT finds what is
finished under ``OUT/trials/<id>``, also after seeds or axes were added.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.heads.registry import find_head_class
from pipeline.base.whole_file import write_whole
from pipeline.base.yaml import SpecError
from pipeline.read.reader import PairReader
from pipeline.read.source import Source, choose_layers, open_layers
from pipeline.runs.config import HeadConfig, TrainConfig
from pipeline.spec.layer import LayerSpec
from pipeline.store.snapshot import (
    Snapshot,
    create_snapshot,
    read_snapshot,
    take_snapshot,
    write_snapshot,
)
from pipeline.store.store import Store
from pipeline.sweep.config import Held, SweepConfig, TestSplit, TrialConfig
from pipeline.train.data import open_readers

PIN = "sweep.json"
BASELINES = "baselines"  # the variant of what needs no head
_ID_VERSION = 1
_ID_DIGITS = 16
_UNNAMED = {  # of a training config: what changes no result
    *("log_every", "checkpoint_every", "keep_checkpoints"),
    *("loader_workers", "trace_pairs", "overlays"),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One head to fit, or the baselines of one choice of pairs."""

    id: str
    config: TrainConfig  # its layers by folder
    variant: str
    label: str | None  # the features layer's name on its axis
    num_pairs: int  # that it is validated on

    @property
    def is_baselines(self) -> bool:
        """Whether no head is fitted."""
        return self.variant == BASELINES

    @property
    def reads_features(self) -> bool:
        """Whether its head reads the UNet's features."""
        return not self.is_baselines and bool(self.config.head.blocks)


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """Everything that a process needs to run any of the trials."""

    config: SweepConfig
    store_url: str
    out: Path  # absolute; every node sees it
    snapshot: Snapshot
    layers: dict[str, LayerSpec]
    trials: tuple[Trial, ...]

    @property
    def num_pairs(self) -> int:
        """Pairs that a trial is validated on, the most of any."""
        return max(trial.num_pairs for trial in self.trials)

    def describe(self) -> str:
        """What will be run, in a few lines."""
        heads = sum(not trial.is_baselines for trial in self.trials)
        return (
            f"{heads} heads and {len(self.trials) - heads} choice of pairs for baselines\n"
            f"layers {', '.join(self.layers)}, snapshot {self.snapshot.digest}, "
            f"up to {self.num_pairs} validation pairs"
        )

    def folder(self, trial: Trial) -> Path:
        """Return where a trial's checkpoints, metrics and result lie."""
        return self.out / "trials" / trial.id

    def open_source(self, trial: Trial) -> Source:
        """Return what a trial reads."""
        data = trial.config.data
        return open_layers(
            self.store_url,
            latents=data.latents,
            features=data.features,
            reads_features=data.features is not None,
            snapshot=self.snapshot,
        )

    def list_timesteps(self, trial: Trial) -> tuple[int, ...] | None:
        """Return the fixed timesteps of the draws that a trial reads; None where there are none."""
        data = trial.config.data
        if not trial.reads_features or data.features is None:
            return None
        timesteps = self.layers[data.features].features.timesteps
        if not isinstance(timesteps, tuple):
            return None
        return timesteps if data.draws is None else tuple(timesteps[i] for i in data.draws)


def plan_sweep(config: SweepConfig, store_url: str, out: Path) -> SweepPlan:
    """Check a sweep against a store and name its trials; pins the snapshot under ``out``.

    Whoever runs the trials holds ``out`` meanwhile: see ``sweep.open_sweep``.

    Raises:
        SpecError: a layer, block, draw or split that the store lacks, or a config that cannot be;
            names it and what there is.
    """
    store, out = Store.open(store_url), out.absolute()
    held = _list_held(store, config)
    found = _name_layers(store, config.list_trials(held))
    layers = {
        folder: store.read_layer(folder) for folder in sorted({f for t in found for f in _reads(t)})
    }
    _check_layers(found, layers, heat_map=config.heat_map)
    snapshot = _pin(store, out, config.base.data.snapshot, layers)
    found += _list_baselines(found)
    counts = _check_splits(found, store, snapshot, config.tests)
    tasks = {folder: _digest_records(snapshot, folder) for folder in layers}
    trials = [_build_trial(t, tasks, num) for t, num in zip(found, counts, strict=True)]
    return SweepPlan(config, store_url, out, snapshot, layers, tuple(trials))


def _list_held(store: Store, config: SweepConfig) -> dict[str | None, Held]:
    """Return what each features layer that the sweep may read holds; nothing where none is read."""
    layers = [layer for layer in store.list_layers() if layer.kind == "features"]
    held: dict[str | None, Held] = {}
    for name in config.list_layers():
        fits = [layer for layer in layers if name is None or layer.folder.endswith(name)]
        if len(fits) == 1:  # else the first trial that reads one says what there is
            held[name] = Held(fits[0].features.blocks, fits[0].features.num_draws)
        elif config.axes.features is not None or config.axes.ask_for_all:
            choose_layers(store, latents=None, features=name, reads_features=True)
    return held


def _name_layers(store: Store, trials: Iterable[TrialConfig]) -> list[TrialConfig]:
    """Return the trials with their layers by folder.

    A choice of layers is looked up once, not once a trial: that lists the store's layers.
    """
    chosen: dict[tuple[str | None, str | None, bool], tuple[LayerSpec, LayerSpec | None]] = {}
    named = []
    for trial in trials:
        data = trial.config.data
        wanted = (data.latents, data.features, trial.reads_features)
        if wanted not in chosen:
            names = {"latents": data.latents, "features": data.features}
            chosen[wanted] = choose_layers(store, **names, reads_features=trial.reads_features)
        latents, features = chosen[wanted]
        folders = {"latents": latents.folder, "features": features.folder if features else None}
        data = data.model_copy(update={**folders, "snapshot": None})  # the sweep has its own
        config = trial.config.model_copy(update={"data": data})
        named.append(TrialConfig(config, trial.variant, trial.features))
    return named


def _reads(trial: TrialConfig) -> tuple[str, ...]:
    data = trial.config.data
    return tuple(folder for folder in (data.latents, data.features) if folder is not None)


def _check_layers(
    trials: Sequence[TrialConfig], layers: dict[str, LayerSpec], *, heat_map: bool
) -> None:
    """Check that the layers hold every trial's blocks and draws, and a map's timesteps."""
    for folder, layer in layers.items():
        over = [t for t in trials if t.config.data.features == folder]
        if not over:
            continue
        spec = layer.features
        blocks = sorted({n for t in over for n in t.config.head.blocks} - set(spec.blocks))
        if blocks:
            raise SpecError(
                f"blocks: {blocks} were not encoded in {folder}, which holds {list(spec.blocks)}; "
                "encode a layer with them, or choose among these"
            )
        asked = {n for t in over for n in t.config.data.draws or ()}
        draws = sorted(asked - set(range(spec.num_draws)))
        if draws:
            raise SpecError(
                f"draws: {draws} were not encoded in {folder}, which stores {spec.num_draws} a "
                f"pair, numbered from 0, at timesteps {spec.timesteps}; choose among "
                f"{list(range(spec.num_draws))}"
            )
        if heat_map and not isinstance(spec.timesteps, tuple):
            raise SpecError(
                f"heat_map: {folder} draws its timesteps at random ({spec.timesteps}), so that a "
                "draw is no row of a map; encode a layer with a list of timesteps"
            )
    if heat_map and not any(is_probe(t.config.head.name) for t in trials):
        raise SpecError("heat_map: expected probes among the trials' heads, got none")


def is_probe(head: str) -> bool:
    """Whether a head of this name reads features alone, so that its score is what they hold."""
    return find_head_class(head).reads == {"features"}


def _pin(store: Store, out: Path, given: str | None, layers: Iterable[str]) -> Snapshot:
    """Return the snapshot that all trials read: the config's, that of OUT, or a new one."""
    path = out / PIN
    pinned = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if pinned is not None and pinned["store"] != store.storage.url:
        raise SpecError(
            f"{out}: holds a sweep over {pinned['store']}, not over {store.storage.url}; give "
            "another --out"
        )
    digest = given or (pinned["snapshot"] if pinned else None)
    snapshot = read_snapshot(store, digest) if digest else None
    if snapshot is None:
        snapshot = create_snapshot(store, layers)
    elif given:
        snapshot.require(layers, option="data.snapshot", reader="the sweep")
    elif missing := snapshot.list_missing(layers):
        snapshot = _extend(store, snapshot, missing)
    plain = {"store": store.storage.url, "snapshot": snapshot.digest}
    if plain != pinned:
        write_whole(path, json.dumps(plain, indent=1) + "\n")
    return snapshot


def _extend(store: Store, snapshot: Snapshot, layers: Iterable[str]) -> Snapshot:
    """Write a snapshot that has layers more, at their newest commits, and return it.

    The layers that it had stay at the commits that they had there: trials over those keep their
    ids, whatever was committed since.
    """
    records = {**snapshot.records, **take_snapshot(store, layers).records}
    return write_snapshot(store, records)


def _check_splits(
    trials: Sequence[TrialConfig],
    store: Store,
    snapshot: Snapshot,
    tests: Mapping[str, TestSplit],
) -> list[int]:
    """Open each choice of pairs once, with every input that it is read with.

    Returns how many pairs each trial is validated on.
    """
    found: dict[str, int] = {}
    counts = []
    for trial in trials:
        config = trial.config
        data = config.data.model_copy(update={"draws": None})
        key = data.model_dump_json() + str(sorted(find_head_class(config.head.name).reads))
        if key not in found:
            source = open_layers(
                store,
                latents=data.latents,
                features=data.features,
                reads_features=data.features is not None,
                snapshot=snapshot,
            )
            found[key] = len(open_readers(config, source)[1])
            for name, test in tests.items():
                _check_test(name, test, config, source)
        counts.append(min(found[key], config.validation_pairs))
    return counts


def _check_test(name: str, test: TestSplit, config: TrainConfig, source: Source) -> None:
    inputs, blocks = find_head_class(config.head.name).reads, config.head.blocks
    try:
        PairReader(source, tasks=test.tasks, inputs=inputs, blocks=blocks, choice=test.filter)
    except SpecError as error:
        raise SpecError(f"tests: {name!r}: {error}") from error


def _list_baselines(trials: Sequence[TrialConfig]) -> list[TrialConfig]:
    """Return a stand-in for each choice of pairs, to be scored without a head."""
    found: dict[str, TrialConfig] = {}
    for trial in trials:
        data = trial.config.data.model_copy(update={"features": None, "draws": None})
        pairs = trial.config.validation_pairs
        config = TrainConfig(
            head=HeadConfig(name="znet"), data=data, num_steps=1, validation_pairs=pairs
        )
        found[config.model_dump_json()] = TrialConfig(config, BASELINES, None)
    return list(found.values())


def _build_trial(trial: TrialConfig, tasks: dict[str, str], num_pairs: int) -> Trial:
    """Name a trial by all that its result depends on, and by no place where something lies.

    Values that are the default are left out, so that a field that is new keeps the ids there are;
    where a default changes, so must ``_ID_VERSION``.
    """
    plain: dict[str, Any] = trial.config.model_dump(
        mode="json", exclude=_UNNAMED, exclude_defaults=True
    )
    plain.get("head", {}).pop("model", None)
    named = {
        "version": _ID_VERSION,
        "config": plain,
        "tasks": [tasks[folder] for folder in _reads(trial)],
        "baselines": trial.variant == BASELINES,
    }
    text = json.dumps(named, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_ID_DIGITS]
    return Trial(digest, trial.config, trial.variant, trial.features, num_pairs)


def _digest_records(snapshot: Snapshot, folder: str) -> str:
    digest = hashlib.sha256()
    for record in snapshot.records[folder]:
        digest.update(f"{record.task}\0{record.generation}\n".encode())
    return digest.hexdigest()
