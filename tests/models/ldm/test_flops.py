"""FLOPs of the UNet: arithmetic by hand, the paper's blocks, a pass that really stops there."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from models.ldm.blocks import compute_features, list_blocks, select_blocks
from models.ldm.flops import count_block_flops
from models.ldm.sd14 import SD14_UNET

SD14_PARAMETERS = 859_520_964


@pytest.fixture(scope="module")
def sd14_unet():
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(SD14_UNET)


@pytest.fixture(scope="module")
def tiny_unet(ldm_folder):
    config = UNet2DConditionModel.load_config(ldm_folder, subfolder="unet")
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def test_the_config_is_sd14s(sd14_unet):
    assert sum(p.numel() for p in sd14_unet.parameters()) == SD14_PARAMETERS


def test_blocks_6_to_10_of_sd14_cost_about_half_of_the_forward(sd14_unet):
    reached, total = count_block_flops(sd14_unet, size_px=384)
    assert list(reached) == list(range(1, 17))
    assert all(reached[n] < reached[n + 1] for n in range(1, 16))
    assert 0.5 < reached[10] / total <= 0.56
    assert reached[16] < total


@pytest.mark.parametrize("last", [1, 7, 10, 16])
def test_the_count_is_that_of_a_pass_that_stops_there(tiny_unet, last):
    inputs = [torch.empty(s, device="meta") for s in ((1, 4, 16, 16), (1,), (1, 77, 64))]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        compute_features(tiny_unet, *inputs, blocks=select_blocks(tiny_unet, [last]))
    reached, _ = count_block_flops(tiny_unet, size_px=128)
    assert reached[last] == counter.get_total_flops()


def test_a_transformers_attention_is_counted_as_by_hand(sd14_unet):
    """Block 1 at 48×48: N 2304 positions, C 320, 77 tokens of width 768."""
    n, c, tokens, width = 48 * 48, 320, 77, 768
    expected = {
        # q, k, v and out, then q·k and its product with v
        "attn1": 2 * 4 * n * c * c + 4 * n * n * c,
        "attn2": 2 * 2 * n * c * c + 2 * 2 * tokens * width * c + 4 * n * tokens * c,
        # GEGLU: to 8 times the width, half of it the gate, and back from 4
        "ff": 2 * n * c * 8 * c + 2 * n * 4 * c * c,
    }
    transformer = sd14_unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0")
    hidden = torch.empty(1, n, c, device="meta")
    text = torch.empty(1, tokens, width, device="meta")
    arguments = {"attn1": (hidden,), "attn2": (hidden, text), "ff": (hidden,)}
    for name, inputs in arguments.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            transformer.get_submodule(name)(*inputs)
        assert counter.get_total_flops() == expected[name], name


def test_sdxls_added_conditions_are_fed(tiny_unet):
    config = {key: value for key, value in tiny_unet.config.items() if not key.startswith("_")}
    config |= {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
    }
    with torch.device("meta"):
        other = UNet2DConditionModel(**config)
    totals = [count_block_flops(unet, size_px=64)[1] for unet in (other, tiny_unet)]
    extra = totals[0] - totals[1]
    width = 4 * config["block_out_channels"][0]
    assert extra == 2 * (6 * 8 + 20) * width + 2 * width * width


def test_no_hook_is_left_behind(tiny_unet):
    count_block_flops(tiny_unet, size_px=64)
    modules = [tiny_unet.get_submodule(block.module) for block in list_blocks(tiny_unet)]
    assert not any(module._forward_hooks for module in modules)


def test_what_cannot_be_counted_is_refused(ldm_folder, tiny_unet):
    unet = UNet2DConditionModel.from_pretrained(ldm_folder, subfolder="unet")
    with pytest.raises(ValueError, match="expected on the meta device, got cpu"):
        count_block_flops(unet, size_px=64)
    with pytest.raises(ValueError, match="multiple of 64 px, got 100"):
        count_block_flops(tiny_unet, size_px=100)
