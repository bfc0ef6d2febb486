"""Layers of a store and the files of their models: fingerprints made, and held to."""

from pathlib import Path
from typing import Any, Literal

from models.ldm_family import (
    check_family,
    check_scaling_factor,
    find_text_pooled_width,
    read_config,
    zeroes_empty_prompt,
)
from models.ldm_files import (
    FEATURE_PARTS,
    ModelFilesError,
    digest_model_files,
    list_latent_parts,
)
from pipeline.fetch_model import fetch_model
from pipeline.spec import (
    INT8_TOLERANCE,
    SCHEMA_VERSION,
    SD_SCALING_FACTOR,
    TOLERANCES,
    LayerSpec,
    Spec,
    fingerprint,
)


def build_layers(spec: Spec, *, folder: Path | None = None) -> tuple[LayerSpec, LayerSpec | None]:
    """Resolve a spec against its model's files into a latents layer and perhaps a features layer.

    Reads every weight, config and tokenizer file of the model once, for its digest. ``folder`` is
    what ``check_spec`` returned of this spec; without it the model is looked for and checked here.

    Raises:
        ModelFilesError: the model is not there, or not of a family or in a form that is read.
        OSError: as ``fetch_model``, of a model at a URL.
    """
    latents = spec.latents
    if folder is None:
        folder = fetch_model(latents.model, revision=latents.revision)
        check_family(folder)  # before gigabytes of weights are read for their digests
    is_folder = Path(latents.model).expanduser().is_dir()
    origin = {
        # Absolute, for workers do not share this process's folder; a hub id or URL stays as it is.
        "model": str(folder.absolute()) if is_folder else latents.model,
        "revision": latents.revision,
        "variant": latents.variant,
    }
    section = latents.model_dump(mode="json", exclude=set(origin))
    weights = digest_model_files(folder, list_latent_parts(folder), variant=latents.variant)
    base = _layer(
        "latents",
        section,
        weights,
        origin,
        tolerance=TOLERANCES[latents.compute],
        scaling_factor=_read_scaling_factor(folder),
        **_describe_text(folder),
    )
    if spec.features is None:
        return base, None
    section = spec.features.model_dump(mode="json")
    weights = digest_model_files(folder, FEATURE_PARTS, variant=latents.variant)
    tolerance = TOLERANCES[spec.features.compute]
    if spec.features.storage == "int8":
        tolerance += INT8_TOLERANCE
    over = _layer(
        "features", section, weights, origin, tolerance=tolerance, latents=base.fingerprint
    )
    return base, over


def _read_scaling_factor(folder: Path) -> float:
    factor = read_config(folder, "vae").get("scaling_factor", SD_SCALING_FACTOR)
    return check_scaling_factor(factor, where=f"{folder / 'vae'}")


def _describe_text(folder: Path) -> dict[str, Any]:
    """What a latents layer records of SDXL's text; nothing for SD 1 and 2, whose layers are older.

    ``model_index.json`` is no part whose digest is taken, so what it says of the empty prompt is
    recorded here.
    """
    width = find_text_pooled_width(folder)
    if width is None:
        return {}
    return {"text_pooled": width, "zero_empty_prompt": zeroes_empty_prompt(folder)}


def _layer(
    kind: Literal["latents", "features"],
    section: dict[str, Any],
    weights: dict[str, str],
    origin: dict[str, Any],
    *,
    tolerance: float,
    **more: Any,
) -> LayerSpec:
    canonical = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "section": section,
        "weights": weights,
        **more,
    }
    return LayerSpec(
        kind=kind,
        fingerprint=fingerprint(canonical),
        canonical=canonical,
        source=origin,
        tolerance=tolerance,
    )


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
