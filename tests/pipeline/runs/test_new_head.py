"""New heads for a store's layers."""

import shutil
from pathlib import Path

import pytest
import torch

from models.ldm.files import ModelFilesError
from pipeline.read.source import open_layers
from pipeline.runs.config import HeadConfig
from pipeline.runs.new_head import build_head


def test_heads_start_from_the_ldms_unet_or_afresh(store_folder):
    source = open_layers(str(store_folder))
    latents, features = source.latents, source.features
    torch.manual_seed(0)
    from_ldm = build_head(HeadConfig(name="znet"), latents, features)
    again = build_head(HeadConfig(name="znet"), latents, None)
    afresh = build_head(HeadConfig(name="znet", initialise="random"), latents, features)
    name = "unet.conv_in.weight"
    assert torch.equal(from_ldm.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(from_ldm.state_dict()[name], afresh.state_dict()[name])


def test_a_probe_reads_the_unets_config_and_no_weights(store_folder, tmp_path):
    """Weights of another model are no matter to it, and no head takes another config."""
    source = open_layers(str(store_folder))
    latents, features = source.latents, source.features
    folder = shutil.copytree(Path(features.source["model"]), tmp_path / "ldm")
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.write_bytes(b"another model's")
    probe = HeadConfig(name="probe", blocks=(8,), model=str(folder))
    assert build_head(probe, latents, features).reads == {"features"}
    afresh = HeadConfig(name="znet", initialise="random", model=str(folder))
    assert "latent" in build_head(afresh, latents, features).reads
    with pytest.raises(ModelFilesError, match=r"unet/.*safetensors differ in SHA-256"):
        build_head(HeadConfig(name="znet", model=str(folder)), latents, features)
    config = folder / "unet" / "config.json"
    config.write_bytes(config.read_bytes() + b" ")
    with pytest.raises(ModelFilesError, match=r"expected the file that features-\w+ was made with"):
        build_head(probe, latents, features)
    config.unlink()
    with pytest.raises(ModelFilesError, match="got none"):
        build_head(probe, latents, features)
