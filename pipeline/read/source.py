"""What a reader reads: a store, the layers of it, and the snapshot that freezes both."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.base.yaml import SpecError
from pipeline.spec.layer import LayerSpec
from pipeline.store.snapshot import Snapshot, take_snapshot
from pipeline.store.store import Store


@dataclass(frozen=True)
class Source:
    """What is read: the layers, and the snapshot of their commits."""

    store: Store
    latents: LayerSpec
    features: LayerSpec | None
    snapshot: Snapshot


def open_layers(store_url: str, latents: str, features: str | None) -> Source:
    """Return a store's layers by their folders, with what is committed of them now."""
    store = Store.open(store_url)
    folders = [folder for folder in (latents, features) if folder is not None]
    return Source(
        store,
        store.read_layer(latents),
        store.read_layer(features) if features else None,
        take_snapshot(store, folders),
    )


def choose_layers(
    store: Store, *, latents: str | None, features: str | None, reads_features: bool
) -> tuple[LayerSpec, LayerSpec | None]:
    """Return the layers to read: those named, or the only ones that fit.

    Names are a layer's folder or its fingerprint.

    Raises:
        SpecError: none fits, or several do and none is named; lists them.
    """
    layers = store.list_layers()
    if reads_features:
        over = _choose_one(store, [x for x in layers if x.kind == "features"], "features", features)
        if latents and not over.latents_folder.endswith(latents):
            raise SpecError(f"{over.folder}: is over {over.latents_folder}, not over {latents}")
        return store.read_layer(over.latents_folder), over
    only = [layer for layer in layers if layer.kind == "latents"]
    return _choose_one(store, only, "latents", latents), None


def _choose_one(
    store: Store, layers: Sequence[LayerSpec], kind: str, name: str | None
) -> LayerSpec:
    found = [layer for layer in layers if name is None or layer.folder.endswith(name)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(layer.folder for layer in layers) or "none"
    wanted = f"a {kind} layer {name!r}" if name else f"one {kind} layer"
    raise SpecError(
        f"{store.storage.url}: expected {wanted}, got {listed}; "
        f"name one under {kind}: in the training config"
    )
