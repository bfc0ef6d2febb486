"""The model files of a layer on this machine, checked against the layer's digests."""

from pathlib import Path

from models.ldm.files import ModelFilesError, digest_model_files
from pipeline.spec.fetch_model import fetch_model
from pipeline.spec.layer import LayerSpec


def find_model(layer: LayerSpec, *, name: str | None = None) -> Path:
    """Return the local folder of a layer's model, its files held to the layer's digests.

    ``name`` overrides the folder, hub id or URL that the layer names.

    Every process that computes with a layer reads the files of its parts for this, and no digest is
    kept between runs: sizes, times and inodes stay what they were when a file's pages rot or
    ``rsync --inplace --times`` writes it anew. SD 1.4's UNet of 3.4 GB takes some seconds, once an
    actor, and leaves the file in the page cache for the load that follows.

    Raises:
        ModelFilesError: not there, or its files are not those that the layer was made with.
        OSError: as ``fetch_model``, of a model at a URL.
    """
    source = layer.source
    model = name or source["model"]
    folder = fetch_model(model, revision=source["revision"])
    expected = layer.canonical["weights"]
    parts = sorted({path.split("/")[0] for path in expected})
    found = digest_model_files(folder, parts, variant=source["variant"])
    changed = sorted(path for path in {*found, *expected} if found.get(path) != expected.get(path))
    if changed:
        again = f"; if {model} is the right one, remove that copy" if "://" in model else ""
        raise ModelFilesError(
            f"{folder}: is not the model that {layer.folder} was made with: {', '.join(changed)} "
            f"differ in SHA-256; name the right folder, or encode a new layer from this one{again}"
        )
    return folder
