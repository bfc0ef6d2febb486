"""Builds the layers that a spec describes: digests of the model's files, and the fingerprints."""

from pathlib import Path
from typing import Any

from models.ldm.family import read_text_pooled_width, zeroes_empty_prompt
from models.ldm.files import FEATURE_COMPONENTS, digest_model_files, list_latent_components
from pipeline.spec.check import check_spec
from pipeline.spec.fields import (
    INT8_TOLERANCE,
    SD_SCALING_FACTOR,
    TOLERANCES,
    Spec,
    dump_section,
)
from pipeline.spec.layer import SCHEMA_VERSION, LayerSpec, fingerprint


def build_layers(spec: Spec, *, where: str = "spec") -> tuple[LayerSpec, LayerSpec | None]:
    """Build a spec's latents layer and, where the spec has one, its features layer.

    Checks the spec first (raising what ``check_spec`` raises), then reads every weight, config and
    tokenizer file of the model once, for its digest. ``where`` names the spec in errors.

    Raises:
        ModelFilesError: a file of the model is missing, or in a form that is not read.
    """
    folder, configs = check_spec(spec, where=where)
    latents, features = spec.latents, spec.features
    is_folder = Path(latents.model).expanduser().is_dir()
    source = {
        # Absolute, for workers do not share this process's folder; a hub id or URL stays as it is.
        "model": str(folder.absolute()) if is_folder else latents.model,
        "revision": latents.revision,
        "variant": latents.variant,
    }
    text: dict[str, Any] = {}
    # Of SDXL alone, so that layers of SD 1 and 2 keep the fingerprints that they had before.
    # What model_index.json says of the empty prompt is recorded since that file has no digest.
    if (width := read_text_pooled_width(configs)) is not None:
        text = {"text_pooled": width, "zero_empty_prompt": zeroes_empty_prompt(folder)}
    base = _build_layer(
        source,
        TOLERANCES[latents.compute],
        kind="latents",
        section=dump_section(latents, without=set(source)),
        weights=digest_model_files(folder, list_latent_components(folder), variant=latents.variant),
        scaling_factor=float(configs["vae"].get("scaling_factor", SD_SCALING_FACTOR)),
        **text,
    )
    if features is None:
        return base, None
    over = _build_layer(
        source,
        TOLERANCES[features.compute] + (INT8_TOLERANCE if features.storage == "int8" else 0),
        kind="features",
        section=dump_section(features, without=set()),
        weights=digest_model_files(folder, FEATURE_COMPONENTS, variant=latents.variant),
        latents=base.fingerprint,
    )
    return base, over


def _build_layer(source: dict[str, Any], tolerance: float, **canonical: Any) -> LayerSpec:
    canonical = {"schema_version": SCHEMA_VERSION} | canonical
    return LayerSpec(
        kind=canonical["kind"],
        fingerprint=fingerprint(canonical),
        canonical=canonical,
        source=source,
        tolerance=tolerance,
    )
