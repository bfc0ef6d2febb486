"""What a spec asks of its model, held to the model's configs before a weight is read for a digest.

Seconds, where a digest of the weights takes minutes and a worker would find out last of all.
"""

from pathlib import Path

from models.ldm.blocks import select_blocks
from models.ldm.family import check_family, read_config
from models.ldm.files import ModelFilesError
from pipeline.base.yaml import SpecError
from pipeline.spec.blocks import build_empty_unet
from pipeline.spec.fetch_model import fetch_model
from pipeline.spec.fields import Spec


def check_spec(spec: Spec, *, where: str = "spec") -> Path:
    """Check that the model is there, is of a family that is read, and has the spec's blocks.

    Returns the model's folder on this machine, for ``build_layers``. ``where`` names the spec in
    errors, such as its file. Timesteps need no check here: a spec holds them to
    ``spec.NUM_TIMESTEPS``, and ``check_family`` the scheduler to as many.

    Raises:
        SpecError: the features' blocks are not some of the UNet's.
        ModelFilesError: there is no such model, or it is not one that is read.
        OSError: as ``fetch_model``, of a model at a URL.
    """
    try:
        folder = fetch_model(spec.latents.model, revision=spec.latents.revision)
    except ModelFilesError as error:  # which begins with the field: "model: expected …"
        raise ModelFilesError(f"{where}: latents.{error}") from error
    check_family(folder)
    if spec.features is None:
        return folder
    unet = build_empty_unet(read_config(folder, "unet"))
    try:
        select_blocks(unet, spec.features.blocks)
    except ValueError as error:
        raise SpecError(f"{where}: features.{error}; `ldznet blocks` lists them") from error
    return folder
