"""The heads on a narrow UNet of SD 1.x's topology, and their sizes at SD 1.4's."""

import json
import logging

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from models.heads.ldznet import LDZNet
from models.heads.registry import HEADS, find_head_class, load_head
from models.ldm.blocks import compute_features, list_blocks, select_blocks
from tests.support.new_heads import build_from_unet

TOPOLOGY = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "attention_head_dim": 8,
}
NARROW = {
    **TOPOLOGY,
    "sample_size": 16,
    "block_out_channels": (32, 64, 128, 128),
    "cross_attention_dim": 64,
}
SD14 = {
    **TOPOLOGY,
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
}
BLOCKS = [6, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def ldm_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(**NARROW).eval()


@pytest.fixture(scope="module")
def linear_unet():
    """SD 2.x's kind: linear projections, and heads of fixed width instead of a fixed number."""
    torch.manual_seed(0)
    heads = (2, 4, 8, 8)
    config = {**NARROW, "use_linear_projection": True, "attention_head_dim": heads}
    return UNet2DConditionModel(**config).eval()


def make_inputs(unet, side=(8, 8), batch=2):
    torch.manual_seed(1)
    latent, text = torch.randn(batch, 4, *side), torch.randn(batch, 5, 64)
    features = compute_features(
        unet,
        torch.randn_like(latent),
        torch.full((batch,), 400),
        text,
        blocks=select_blocks(unet, BLOCKS),
    )
    features = {number: feature.detach() for number, feature in features.items()}
    image = torch.randint(0, 256, (batch, 8 * side[0], 8 * side[1], 3), dtype=torch.uint8)
    return {"latent": latent, "text": text, "features": features, "image": image}


def call(head, batch):
    return head(**{name: batch[name] for name in head.reads})


def make_head(name, unet, **options):
    torch.manual_seed(2)
    return build_from_unet(name, unet, **options)


def share_final(head, other):
    head.final.load_state_dict(other.final.state_dict())


@torch.no_grad()
def test_znet_is_the_ldms_unet_at_timestep_0_with_one_output_channel(ldm_unet):
    head, batch = make_head("znet", ldm_unet).eval(), make_inputs(ldm_unet)
    full = ldm_unet(batch["latent"], 0, batch["text"]).sample
    expected = head.final(F.silu(full[:, :1]))
    torch.testing.assert_close(call(head, batch), expected, rtol=1e-5, atol=1e-6)
    assert head.unet.conv_out.out_channels == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ldm_unet", "linear_unet"])
def test_ldznet_with_silent_features_is_znet(kind, request):
    unet = request.getfixturevalue(kind)
    batch = make_inputs(unet, side=(8, 16))
    znet, ldznet = make_head("znet", unet).eval(), make_head("ldznet", unet).eval()
    share_final(ldznet, znet)
    assert (call(ldznet, batch) - call(znet, batch)).abs().max() > 1e-4
    for name, parameter in ldznet.named_parameters():
        if "attn3.to_out" in name:
            parameter.zero_()
    torch.testing.assert_close(call(ldznet, batch), call(znet, batch), rtol=0, atol=1e-6)


@torch.no_grad()
def test_concatenation_starts_as_znet_and_then_reads_the_feature(ldm_unet):
    batch = make_inputs(ldm_unet)
    znet = make_head("znet", ldm_unet).eval()
    head = make_head("ldznet", ldm_unet, fusion="concatenation").eval()
    share_final(head, znet)
    torch.testing.assert_close(call(head, batch), call(znet, batch), rtol=0, atol=1e-6)
    head.unet.mid_block.attentions[0].merge.weight[:, 128:] = 0.1
    assert (call(head, batch) - call(znet, batch)).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["attention", "concatenation"])
def test_every_block_reads_its_own_feature(ldm_unet, fusion):
    head = make_head("ldznet", ldm_unet, fusion=fusion).eval()
    for name, parameter in head.named_parameters():
        if "merge" in name or "attn3" in name:
            parameter.normal_(std=0.1)
    batch = make_inputs(ldm_unet)
    before = call(head, batch)
    for number in BLOCKS:
        features = dict(batch["features"])
        features[number] = features[number] + torch.randn_like(features[number])
        assert not torch.equal(call(head, {**batch, "features": features}), before), number


@torch.no_grad()
def test_the_added_attention_stands_between_text_and_feed_forward(ldm_unet):
    block = make_head("ldznet", ldm_unet).unet.mid_block.attentions[0].transformer_blocks[0]
    hidden, text, context = torch.randn(1, 6, 128), torch.randn(1, 5, 64), torch.randn(1, 7, 128)
    x = hidden + block.attn1(block.norm1(hidden))
    x = x + block.attn2(block.norm2(x), encoder_hidden_states=text)
    x = x + block.attn3(block.norm_sd(x), encoder_hidden_states=context)
    x = x + block.ff(block.norm3(x))
    torch.testing.assert_close(block(hidden, None, text, None, context), x)
    assert block.attn3.to_q.bias is block.attn3.to_k.bias is block.attn3.to_v.bias is None
    assert block.attn3.to_out[0].bias is not None


@torch.no_grad()
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("side", [(8, 8), (16, 8)])
def test_logits_have_the_images_size(ldm_unet, name, side):
    logits = call(make_head(name, ldm_unet).eval(), make_inputs(ldm_unet, side))
    assert logits.shape == (2, 1, 8 * side[0], 8 * side[1])
    assert logits.isfinite().all()


@torch.no_grad()
def test_stored_float16_inputs_are_widened(ldm_unet):
    head, batch = make_head("ldznet", ldm_unet).eval(), make_inputs(ldm_unet)
    half = {
        "latent": batch["latent"].half(),
        "text": batch["text"].half(),
        "features": {number: value.half() for number, value in batch["features"].items()},
    }
    logits = call(head, half)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, call(head, batch), rtol=0, atol=2e-2)


@torch.no_grad()
def test_rgbnet_takes_bytes_and_unit_floats_alike(ldm_unet):
    head, batch = make_head("rgbnet", ldm_unet).eval(), make_inputs(ldm_unet)
    unit = {**batch, "image": batch["image"].float() / 255}
    torch.testing.assert_close(call(head, unit), call(head, batch), rtol=0, atol=1e-4)
    seen = []
    head.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    call(head, batch)
    assert seen[0].shape == (2, 3, 64, 64)
    assert seen[0].min() < -0.9
    assert 0.9 < seen[0].max() <= 1


@pytest.mark.parametrize("name", HEADS)
def test_gradient_reaches_every_parameter_checkpointed_or_not(ldm_unet, name):
    # Nowhere zero as a whole. Within time_embedding.linear_1.weight half the columns are, since
    # the sine half of timestep 0 is zero, and the key biases of the pools, which softmax cancels.
    gradients = []
    batch = make_inputs(ldm_unet)
    for checkpointing in (False, True):
        head = make_head(name, ldm_unet)
        if checkpointing:
            head.enable_gradient_checkpointing()
        call(head, batch).square().mean().backward()
        gradients.append({key: value.grad for key, value in head.named_parameters()})
    plain, checkpointed = gradients
    assert [key for key, value in plain.items() if value is None or not value.any()] == []
    for key, value in plain.items():
        torch.testing.assert_close(checkpointed[key], value, rtol=1e-4, atol=1e-7, msg=key)


def test_checkpointing_really_recomputes_the_feature_blocks(ldm_unet):
    head, batch = make_head("ldznet", ldm_unet), make_inputs(ldm_unet)
    head.enable_gradient_checkpointing()
    calls = []
    block = head.unet.mid_block.attentions[0].transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    call(head, batch).mean().backward()
    assert len(calls) == 2


@pytest.mark.thorough
def test_a_head_of_random_weights_overfits_one_batch(ldm_unet):
    head, batch = make_head("ldznet", ldm_unet), make_inputs(ldm_unet)
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, 8:40, 16:56] = 1
    mask[1, :, 24:64, 0:24] = 1
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(12):
        loss = F.binary_cross_entropy_with_logits(call(head, batch), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = 0.587  # nats a pixel of a constant prediction at this share of foreground
    assert loss.item() < 0.75 * entropy


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("znet", {}),
        ("rgbnet", {}),
        ("ldznet", {}),
        ("ldznet", {"fusion": "concatenation", "blocks": [7, 9]}),
    ],
)
def test_a_saved_head_is_the_same_again(ldm_unet, name, options, tmp_path):
    head, batch = make_head(name, ldm_unet, **options).eval(), make_inputs(ldm_unet)
    head.save_pretrained(tmp_path / "new" / "head")
    head.save_pretrained(tmp_path / "new" / "head")  # over an older one
    loaded = load_head(tmp_path / "new" / "head").eval()
    assert type(loaded) is type(head)
    assert loaded.config == head.config == json.loads(json.dumps(head.config))
    with torch.no_grad():
        assert torch.equal(call(loaded, batch), call(head, batch))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    files = sorted(path.name for path in (tmp_path / "new" / "head").iterdir())
    assert files == ["config.json", "model.safetensors"]


def test_the_config_rebuilds_the_head_and_holds_no_path(ldm_unet):
    head = LDZNet.from_ldm(ldm_unet, size_px=64, blocks=[9, 7], feature_channels={7: 64})
    assert not [key for key in head.config["unet_config"] if key.startswith("_")]
    again = LDZNet.from_config(head.config)
    assert again.feature_channels == {7: 64, 9: 128}
    assert again.config == head.config


def test_from_ldm_copies_and_does_not_share(ldm_unet):
    before = ldm_unet.conv_in.weight.clone()
    head = make_head("znet", ldm_unet)
    with torch.no_grad():
        head.unet.conv_in.weight.zero_()
    assert torch.equal(ldm_unet.conv_in.weight, before)


@pytest.mark.parametrize(("name", "expected"), [("znet", 859_512_376), ("ldznet", 925_882_936)])
def test_parameter_counts_at_sd14_are_the_papers(name, expected):
    with torch.device("meta"):
        head = find_head_class(name)(unet_config=SD14)
    assert sum(parameter.numel() for parameter in head.parameters()) == expected
    assert sum(parameter.numel() for parameter in head.final.parameters()) == 55


def test_default_blocks_and_grids_are_the_papers():
    with torch.device("meta"):
        head = LDZNet(unet_config=SD14)
    assert {number: pool.grid for number, pool in head.pools.items()} == {
        "6": (12, 12), "7": (6, 6), "8": (12, 12), "9": (12, 12), "10": (12, 12)
    }  # fmt: skip
    assert {pool.num_heads for pool in head.pools.values()} == {8}
    assert list(head.feature_channels.values()) == [1280] * 5


def test_wrapping_logs_no_warning_and_keeps_diffusers_names(ldm_unet, caplog):
    names = {name for name, _ in ldm_unet.named_parameters()}
    head, batch = make_head("ldznet", ldm_unet).eval(), make_inputs(ldm_unet)
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING), torch.no_grad():
        call(head, batch)
    assert caplog.records == []
    assert names < {name for name, _ in head.unet.named_parameters()}
    assert len(list_blocks(ldm_unet)) == 16  # the LDM itself is left as it was


@pytest.fixture(scope="module")
def sdxl_unet():
    """SDXL's kind: three levels, the first without text, two layers a transformer, pooled text."""
    torch.manual_seed(0)
    config = {
        **NARROW,
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        "block_out_channels": (32, 64, 128),
        "attention_head_dim": (2, 4, 8),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
    }
    return UNet2DConditionModel(**config).eval()


def make_sdxl_inputs(batch=2):
    torch.manual_seed(1)
    sides = {6: 2, 7: 2, 8: 2, 9: 4, 10: 4}
    channels = {6: 128, 7: 128, 8: 128, 9: 64, 10: 64}
    return {
        "latent": torch.randn(batch, 4, 8, 8),
        "text": torch.randn(batch, 5, 64),
        "text_pooled": torch.randn(batch, 48),
        "features": {n: torch.randn(batch, channels[n], sides[n], sides[n]) for n in sides},
        "image": torch.randint(0, 256, (batch, 64, 64, 3), dtype=torch.uint8),
    }


@torch.no_grad()
def test_znet_of_sdxl_is_its_unet_with_the_pooled_text_and_the_views_size(sdxl_unet):
    head, batch = make_head("znet", sdxl_unet).eval(), make_sdxl_inputs()
    time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    added = {"text_embeds": batch["text_pooled"], "time_ids": time_ids}
    full = sdxl_unet(batch["latent"], 0, batch["text"], added_cond_kwargs=added).sample
    logits = head(latent=batch["latent"], text=batch["text"], text_pooled=batch["text_pooled"])
    torch.testing.assert_close(logits, head.final(F.silu(full[:, :1])), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"text_pooled must be \(2, 48\).* got none"):
        call(head, batch)


@pytest.mark.parametrize("fusion", ["attention", "concatenation"])
def test_ldznet_of_sdxl_reads_every_feature_in_every_layer(sdxl_unet, fusion):
    head, batch = make_head("ldznet", sdxl_unet, fusion=fusion), make_sdxl_inputs()
    head(**{name: batch[name] for name in (*head.reads, "text_pooled")}).square().mean().backward()
    assert [name for name, value in head.named_parameters() if not value.grad.any()] == []
    if fusion == "attention":
        assert len([name for name, _ in head.named_parameters() if "attn3.to_q" in name]) == 13
