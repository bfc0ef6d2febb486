"""What a reader reads: the layers of a store, and the snapshot that freezes their commits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.base.yaml import SpecError
from pipeline.spec.layer import LayerSpec
from pipeline.store.snapshot import Snapshot, create_snapshot, read_snapshot, take_repairs
from pipeline.store.store import Store


@dataclass(frozen=True)
class Source:
    """A latents layer, a features layer over it where one is read, and their frozen commits."""

    store: Store
    latents: LayerSpec
    features: LayerSpec | None
    snapshot: Snapshot

    @property
    def folders(self) -> list[str]:
        """The folders of the layers."""
        return [layer.folder for layer in (self.latents, self.features) if layer is not None]


def open_layers(
    store: Store | str,
    *,
    latents: str | None = None,
    features: str | None = None,
    reads_features: bool = True,
    snapshot: Snapshot | str | None = None,
    write: bool = False,
    out: Path | None = None,
) -> Source:
    """Open a store's layers at a snapshot.

    Args:
        store: a store, or its URL.
        latents, features, reads_features: as ``choose_layers``.
        snapshot: a snapshot, or the digest of one, which is read with the repairs made since; None:
            what is committed now.
        write: write the snapshot of what is committed now, so that it can be read again; where
            the store refuses, it says so (``keep_snapshot``).
        out: the folder of a run, which may have kept the snapshot that is named.

    Raises:
        SpecError: as ``choose_layers``, or the store holds no such snapshot. Whether a snapshot
            that is given holds the layers is not checked (``Snapshot.require``).
    """
    store = Store.open(store) if isinstance(store, str) else store
    chosen = choose_layers(store, latents=latents, features=features, reads_features=reads_features)
    folders = [layer.folder for layer in chosen if layer is not None]
    if isinstance(snapshot, str):
        snapshot = take_repairs(store, read_snapshot(store, snapshot, out=out), folders)
    elif snapshot is None:
        snapshot = create_snapshot(store, folders, write=write)
    return Source(store, *chosen, snapshot)


def choose_layers(
    store: Store, *, latents: str | None, features: str | None, reads_features: bool
) -> tuple[LayerSpec, LayerSpec | None]:
    """Return the layers to read: those named, or the only ones that fit.

    A name is a layer's folder or its fingerprint. Without ``reads_features`` it is a latents layer
    alone, whatever ``features`` says.

    Raises:
        SpecError: none fits, or several do and none is named; lists them.
    """
    if not reads_features:
        return _choose_layer(store, "latents", latents), None
    over = _choose_layer(store, "features", features)
    if latents and not over.latents_folder.endswith(latents):
        raise SpecError(f"{over.folder}: is over {over.latents_folder}, not over {latents}")
    return store.read_layer(over.latents_folder), over


def _choose_layer(
    store: Store, kind: Literal["latents", "features"], name: str | None
) -> LayerSpec:
    if name and name.startswith(kind) and store.storage.exists(f"{name}/spec.json"):
        return store.read_layer(name)  # the other layers' specs need not be read
    layers = [layer for layer in store.list_layers(required=True) if layer.kind == kind]
    found = [layer for layer in layers if name is None or layer.folder.endswith(name)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(layer.folder for layer in layers) or "none"
    wanted = f"a {kind} layer {name!r}" if name else f"one {kind} layer"
    raise SpecError(
        f"{store.storage.url}: expected {wanted}, got {listed}; "
        f"name one as data.{kind} in the training config, or as evaluate's --layer"
    )
