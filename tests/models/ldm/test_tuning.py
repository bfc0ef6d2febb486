"""Run options: values within the tolerance, and nothing compiled anew for a smaller batch."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from models.ldm.blocks import compute_features, select_blocks
from models.ldm.encoders import tune
from models.ldm.tuning import PLAIN, Tuning

UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
BLOCKS = (1, 2, 3)


def build(tuning):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET).eval()
    tune(unet, tuning)
    return unet


@torch.inference_mode()
def run(unet, batch):
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(6, 4, 8, 8, generator=generator)[:batch]
    text = torch.randn(6, 5, 24, generator=generator)[:batch]
    timestep = torch.full((batch,), 400)
    return compute_features(unet, latent, timestep, text, blocks=select_blocks(unet, BLOCKS))


def check_close(features, reference):
    for number, expected in reference.items():
        assert (features[number] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_plain_changes_nothing():
    unet = build(PLAIN)
    assert all(p.is_contiguous() for p in unet.parameters())
    assert all(module._compiled_call_impl is None for module in unet.modules())


def test_channels_last_moves_convolutions_and_not_values():
    unet = build(Tuning(channels_last=True))
    kernels = [m.weight for m in unet.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)
    assert not all(w.is_contiguous() for w in kernels)
    check_close(run(unet, 6), run(build(PLAIN), 6))


@pytest.mark.slow
def test_compiled_blocks_give_the_values_and_a_smaller_batch_compiles_nothing():
    unet = build(Tuning(channels_last=True, compile=True))
    check_close(run(unet, 6), run(build(PLAIN), 6))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before > 0
    check_close(run(unet, 5), run(build(PLAIN), 5))
    check_close(run(unet, 2), run(build(PLAIN), 2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
