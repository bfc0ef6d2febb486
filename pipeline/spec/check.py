"""Checks a spec against its model's configs, in seconds and before any weight is read.

The digests of the weights take minutes, and a worker would find such a fault last of all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.ldm.blocks import select_blocks
from models.ldm.family import read_configs
from models.ldm.files import ModelFilesError
from pipeline.base.yaml import SpecError
from pipeline.spec.blocks import build_empty_unet
from pipeline.spec.fetch_model import fetch_model
from pipeline.spec.fields import Spec


def check_spec(spec: Spec, *, where: str = "spec") -> tuple[Path, Mapping[str, Mapping[str, Any]]]:
    """Check that a spec's model is there, is of a family that is read, and has the spec's blocks.

    Timesteps need no check here: a spec's are below ``fields.NUM_TIMESTEPS``, and ``read_configs``
    holds the scheduler to as many. ``where`` names the spec in errors, such as its file. Returns
    the model's folder on this machine, and its configs (part → config).

    Raises:
        SpecError: a block of the features section is none of the UNet's.
        ModelFilesError: there is no such model, or it is not one that is read.
        OSError: as ``fetch_model``, of a model at a URL.
    """
    try:
        folder = fetch_model(spec.latents.model, revision=spec.latents.revision)
    except ModelFilesError as error:  # which begins with the field: "model: expected …"
        raise ModelFilesError(f"{where}: latents.{error}") from error
    configs = read_configs(folder, need=("unet",) if spec.features else ())
    if spec.features is not None:
        try:
            select_blocks(build_empty_unet(configs["unet"]), spec.features.blocks)
        except ValueError as error:
            raise SpecError(f"{where}: features.{error}; `ldznet blocks` lists them") from error
    return folder, configs
