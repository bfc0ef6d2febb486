"""Layers of a store and the files of their models: fingerprints made, and held to."""

from pathlib import Path
from typing import Any, Literal

from models.ldm.family import (
    check_family,
    check_scaling_factor,
    find_text_pooled_width,
    read_config,
    zeroes_empty_prompt,
)
from models.ldm.files import FEATURE_PARTS, digest_model_files, list_latent_parts
from pipeline.spec.fetch_model import fetch_model
from pipeline.spec.fields import INT8_TOLERANCE, SD_SCALING_FACTOR, TOLERANCES, Spec
from pipeline.spec.layer import SCHEMA_VERSION, LayerSpec, fingerprint


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
