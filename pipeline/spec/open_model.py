"""Opens the model that a layer was made with: files verified, then loaded as frozen encoders."""

from collections.abc import Sequence
from pathlib import Path

import torch

from models.ldm.encoders import COMPUTE_DTYPES, FeatureEncoder, LatentEncoder
from models.ldm.files import ModelFilesError, digest_model_files
from models.ldm.text_encoder import TextEncoder
from models.ldm.tuning import PLAIN, Tuning
from pipeline.spec.fetch_model import fetch_model
from pipeline.spec.layer import LayerSpec


def open_model(layer: LayerSpec, *, model: str | None = None) -> Path:
    """Fetch a layer's model, verify the layer's parts of it, and return its local folder.

    ``model`` overrides the folder, hub id or URL that the layer names.

    Every process that computes with a layer reads these files for their SHA-256, and no digest is
    kept between runs: sizes, times and inodes stay what they were when a file's pages rot or
    ``rsync --inplace --times`` writes it anew. SD 1.4's UNet of 3.4 GB takes some seconds, once an
    actor, and stays in the page cache for the load that follows.

    Raises:
        ModelFilesError: not there, or its files are not those that the layer was made with.
        OSError: as ``fetch_model``, of a model at a URL.
    """
    folder, source = find_model(layer, model), layer.source
    expected = layer.canonical["weights"]
    parts = sorted({path.split("/")[0] for path in expected})
    found = digest_model_files(folder, parts, variant=source["variant"])
    changed = sorted(path for path in {*found, *expected} if found.get(path) != expected.get(path))
    if changed:
        model = model or source["model"]
        again = f"; if {model} is the right one, remove that copy" if "://" in model else ""
        raise ModelFilesError(
            f"{folder}: is not the model that {layer.folder} was made with: {', '.join(changed)} "
            f"differ in SHA-256; name the right folder, or encode a new layer from this one{again}"
        )
    return folder


def find_model(layer: LayerSpec, model: str | None = None) -> Path:
    """Return the local folder of a layer's model, unverified, or of ``model``, which is given.

    Raises:
        ModelFilesError: it is not there; where the layer's record named it, how to name another.
        OSError: as ``fetch_model``.
    """
    try:
        return fetch_model(model or layer.source["model"], revision=layer.source["revision"])
    except ModelFilesError as error:
        if model is not None:
            raise
        raise ModelFilesError(
            f"{error} This is where {layer.folder} had its model when it was encoded (a relative "
            f"path counts from {Path.cwd()}); if it is elsewhere now, name it: head.model in a "
            "training's config, --model for segment"
        ) from error


def open_latent_encoder(
    layer: LayerSpec, *, device: torch.device, model: str | None = None, tuning: Tuning = PLAIN
) -> LatentEncoder:
    """Open the VAE and text encoder of a latents layer; errors as ``open_model``."""
    return LatentEncoder.from_pretrained(
        open_model(layer, model=model),
        variant=layer.source["variant"],
        compute=layer.latents.compute,
        zero_empty_prompt=layer.zero_empty_prompt,
        device=device,
        tuning=tuning,
    )


def open_text_encoder(
    layer: LayerSpec, *, device: torch.device, model: str | None = None
) -> TextEncoder:
    """Open the text encoder alone of a latents layer, frozen; errors as ``open_model``."""
    encoder = TextEncoder.from_pretrained(
        open_model(layer, model=model),
        variant=layer.source["variant"],
        dtype=COMPUTE_DTYPES[layer.latents.compute],
        zero_empty_prompt=layer.zero_empty_prompt,
    )
    return encoder.to(device).eval().requires_grad_(False)


def open_feature_encoder(
    layer: LayerSpec,
    *,
    device: torch.device,
    model: str | None = None,
    blocks: Sequence[int] | None = None,
    tuning: Tuning = PLAIN,
) -> FeatureEncoder:
    """Open the UNet of a features layer; errors as ``open_model``.

    It computes the layer's blocks, or ``blocks`` alone where they are given.
    """
    return FeatureEncoder.from_pretrained(
        open_model(layer, model=model),
        blocks=blocks or layer.features.blocks,
        variant=layer.source["variant"],
        compute=layer.features.compute,
        device=device,
        tuning=tuning,
    )
