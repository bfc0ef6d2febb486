"""New heads for a store's layers."""

import torch

from pipeline.build_head import build_head
from pipeline.train_config import HeadConfig
from tests.train_runs import open_source


def test_heads_start_from_the_ldms_unet_or_afresh(store_folder):
    source = open_source(store_folder)
    latents, features = source.latents, source.features
    torch.manual_seed(0)
    from_ldm = build_head(HeadConfig(name="znet"), latents, features)
    again = build_head(HeadConfig(name="znet"), latents, None)
    afresh = build_head(HeadConfig(name="znet", initialise="random"), latents, features)
    name = "unet.conv_in.weight"
    assert torch.equal(from_ldm.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(from_ldm.state_dict()[name], afresh.state_dict()[name])
