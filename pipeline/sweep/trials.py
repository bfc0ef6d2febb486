"""The trials of a sweep over a store, all checked before the first one starts.

Data flow: a sweep's config -> its layers -> one snapshot of them for all trials, kept in
``OUT/sweep.json`` -> the trials -> the id of each, a digest of its config, its layers and the
commits that it reads. So another run with the same OUT finds the finished trials under
``OUT/trials/<id>``, also after seeds or axes were added.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.heads.registry import find_head_class
from pipeline.base.yaml import SpecError
from pipeline.read.reader import PairReader
from pipeline.read.source import Source, choose_layers, open_layers
from pipeline.runs.config import DataConfig, HeadConfig, TrainConfig, list_draws
from pipeline.spec.fields import FeaturesSpec
from pipeline.spec.layer import LayerSpec
from pipeline.store.snapshot import Snapshot
from pipeline.store.store import Store
from pipeline.sweep.config import BASELINE_VARIANT, SweepConfig, TestSplit, TrialConfig
from pipeline.sweep.pin import pin_snapshot
from pipeline.train.data import check_readers

_ID_VERSION = 1
_ID_DIGITS = 16
_NOT_IN_ID = {  # fields of a training config that change no result
    *("log_every", "checkpoint_every", "keep_checkpoints"),
    *("loader_workers", "trace_pairs", "overlays"),
}


@dataclass(frozen=True, slots=True)
class Trial(TrialConfig):
    """A trial whose config has its layers by folder, with its id."""

    id: str
    num_pairs: int  # of its validation


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
        """The most pairs on which a trial is validated."""
        return max(trial.num_pairs for trial in self.trials)

    def describe(self) -> str:
        """Summarise the plan in a few lines."""
        num_heads = sum(not trial.is_baselines for trial in self.trials)
        return (
            f"{num_heads} heads and {len(self.trials) - num_heads} choice of pairs for baselines\n"
            f"layers {', '.join(self.layers)}, snapshot {self.snapshot.digest}, "
            f"up to {self.num_pairs} validation pairs"
        )

    def folder(self, trial: Trial) -> Path:
        """Return the folder of a trial's checkpoints, metrics and result."""
        return self.out / "trials" / trial.id

    def open_layers(self, trial: Trial) -> Source:
        """Return the layers and the snapshot that a trial reads."""
        return _open_layers(self.store_url, trial.config.data, self.snapshot)

    def list_timesteps(self, trial: Trial) -> tuple[int, ...] | None:
        """Return the timesteps of the draws that a trial reads, or None if they are not fixed."""
        data = trial.config.data
        if not trial.reads_features or data.features is None:
            return None
        timesteps = self.layers[data.features].features.timesteps
        if not isinstance(timesteps, tuple):
            return None
        return timesteps if data.draws is None else tuple(timesteps[i] for i in data.draws)


def plan_sweep(config: SweepConfig, store_url: str, out: Path) -> SweepPlan:
    """Check a sweep against a store, list its trials, and pin the snapshot under ``out``.

    The caller must hold the lock of ``out``, as ``open_sweep`` does.

    Raises:
        SpecError: the store lacks a layer, block, draw or split, or a trial's config is not valid.
    """
    store, out = Store.open(store_url), out.absolute()
    specs = _list_specs(store, config)
    found, layers = _choose_layers(store, config.list_trials(specs))
    _check_layers(found, layers, heat_map=config.heat_map)
    pinned, snapshot = pin_snapshot(store, out, config.base.data.snapshot, layers)
    found += _list_baselines(found)
    counts = _check_splits(found, store, snapshot, config.tests)
    # A trial's id tells of no repair.
    tasks = {folder: _digest_records(pinned, folder) for folder in layers}
    trials = [_build_trial(t, tasks, num) for t, num in zip(found, counts, strict=True)]
    first = {trial.id: trial for trial in reversed(trials)}
    if same := [trial for trial in trials if first[trial.id] is not trial]:
        raise SpecError(
            f"variants: {first[same[0].id].variant} and {same[0].variant} are one trial, such as "
            "heads from equal weights in two places; leave one of them out"
        )
    return SweepPlan(config, store.storage.url, out, snapshot, layers, tuple(trials))


def _list_specs(store: Store, config: SweepConfig) -> dict[str | None, FeaturesSpec]:
    """Return the specs of the features layers that the sweep may read, as it names them."""
    layers = [layer for layer in store.list_layers() if layer.kind == "features"]
    specs: dict[str | None, FeaturesSpec] = {}
    for name in config.list_layers():
        fits = [layer for layer in layers if name is None or layer.folder.endswith(name)]
        if len(fits) == 1:  # else the first trial that reads one says what there is
            specs[name] = fits[0].features
        elif config.axes.features is not None or config.axes.ask_for_all:
            choose_layers(store, latents=None, features=name, reads_features=True)
    return specs


def _choose_layers(
    store: Store, trials: Iterable[TrialConfig]
) -> tuple[list[TrialConfig], dict[str, LayerSpec]]:
    """Return the trials with their layers by folder, and these layers, sorted by folder."""
    choose = functools.cache(functools.partial(choose_layers, store))
    layers: dict[str, LayerSpec] = {}
    named = []
    for trial in trials:
        data = trial.config.data
        latents, features = choose(
            latents=data.latents, features=data.features, reads_features=trial.reads_features
        )
        layers |= {layer.folder: layer for layer in (latents, features) if layer is not None}
        folders = {"latents": latents.folder, "features": features.folder if features else None}
        data = data.model_copy(update={**folders, "snapshot": None})  # the sweep has its own
        config = trial.config.model_copy(update={"data": data})
        named.append(TrialConfig(config, trial.variant, trial.features))
    return named, dict(sorted(layers.items()))


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
        for trial in over:
            list_draws(trial.config.data, layer)
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


def _open_layers(store: Store | str, data: DataConfig, snapshot: Snapshot) -> Source:
    return open_layers(
        store,
        latents=data.latents,
        features=data.features,
        reads_features=data.features is not None,
        snapshot=snapshot,
    )


def _check_splits(
    trials: Sequence[TrialConfig], store: Store, snapshot: Snapshot, tests: Mapping[str, TestSplit]
) -> list[int]:
    """Open each choice of pairs once; return the number of validation pairs of each trial."""
    found: dict[str, int] = {}
    counts = []
    for trial in trials:
        config = trial.config
        data = config.data.model_copy(update={"draws": None})
        inputs, blocks = find_head_class(config.head.name).reads, config.head.blocks
        key = data.model_dump_json() + str(sorted(inputs))
        if key not in found:
            source = _open_layers(store, data, snapshot)
            found[key] = len(check_readers(config, source)[1])
            for name, test in tests.items():
                choice = test.filter
                PairReader(
                    source,
                    tasks=test.tasks,
                    option=f"tests: {name!r}: tasks",
                    inputs=inputs,
                    blocks=blocks,
                    choice=choice,
                    negatives=False,
                )
        counts.append(min(found[key], config.validation_pairs))
    return counts


def _list_baselines(trials: Sequence[TrialConfig]) -> list[TrialConfig]:
    """Return a trial that scores the baselines for each choice of pairs."""
    found: dict[str, TrialConfig] = {}
    for trial in trials:
        data = trial.config.data.model_copy(update={"features": None, "draws": None})
        pairs = trial.config.validation_pairs
        config = TrainConfig(
            head=HeadConfig(name="znet"), data=data, num_steps=1, validation_pairs=pairs
        )
        found[config.model_dump_json()] = TrialConfig(config, BASELINE_VARIANT, None)
    return list(found.values())


def _build_trial(trial: TrialConfig, tasks: dict[str, str], num_pairs: int) -> Trial:
    """Give a trial its id: a digest of all that its result depends on, and of no path.

    Values that are the default are left out, so that a new field does not change the ids. If a
    default changes, ``_ID_VERSION`` must change.
    """
    data = trial.config.data
    plain: dict[str, Any] = trial.config.model_dump(
        mode="json", exclude=_NOT_IN_ID, exclude_defaults=True
    )
    plain["head"].pop("model", None)
    if (start := trial.config.head.from_) is not None:
        plain["head"]["from"] = start.sha256
    named = {
        "version": _ID_VERSION,
        "config": plain,
        "tasks": [tasks[x] for x in (data.latents, data.features) if x is not None],
        "baselines": trial.is_baselines,
    }
    text = json.dumps(named, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_ID_DIGITS]
    return Trial(trial.config, trial.variant, trial.features, digest, num_pairs)


def _digest_records(snapshot: Snapshot, folder: str) -> str:
    digest = hashlib.sha256()
    for record in snapshot.records[folder]:
        digest.update(f"{record.task}\0{record.generation}\n".encode())
    return digest.hexdigest()
