"""What the heads refuse: inputs, options, configs and saved folders that do not fit."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from models.heads.ldznet import LDZNet
from models.heads.registry import load_head
from models.heads.rgbnet import RGBNet
from models.heads.znet import ZNet
from tests.models.heads.test_registry import NARROW, call, make_head, make_inputs


@pytest.fixture(scope="module")
def ldm_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(**NARROW).eval()


def without_block_8(batch):
    features = {number: value for number, value in batch["features"].items() if number != 8}
    return {**batch, "features": features}


def with_feature(number, *shape):
    return lambda batch: {**batch, "features": {**batch["features"], number: torch.zeros(shape)}}


def with_input(name, *shape):
    return lambda batch: {**batch, name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ldznet", without_block_8, r"must hold blocks \[6, 7, 8, 9, 10\], got .* without block 8"),
        ("ldznet", with_feature(9, 2, 64, 2, 2), r"block 9 must be \(2, 128, h, w\), got \(2, 64"),
        ("ldznet", with_feature(9, 1, 128, 2, 2), r"block 9 must be \(2, 128, h, w\), got \(1,"),
        ("znet", with_input("latent", 2, 3, 8, 8), r"latent must be \(B, 4, h, w\), got \(2, 3"),
        ("znet", with_input("latent", 2, 4, 8, 12), r"multiples of 8 .*64 px.*got 8×12"),
        ("znet", with_input("text", 2, 5, 32), r"text must be \(2, tokens, 64\), got \(2, 5, 32\)"),
        ("znet", with_input("text", 1, 5, 64), r"text must be \(2, tokens, 64\), got \(1, 5, 64\)"),
        ("ldznet", with_feature(6, 2, 128, 4, 4), r"block 6 must have 2×2 .* 8×8, got 4×4"),
        ("ldznet", with_feature(6, 2, 128, 1, 2), r"block 6 must have 2×2 .* 8×8, got 1×2"),
        ("ldznet", with_feature(6, 2, 128, 0, 2), r"block 6 must have at least one row and sides"),
        ("znet", with_input("latent", 0, 4, 8, 8), "latent must have at least one row"),
        ("ldznet", with_input("latent", 0, 4, 8, 8), "latent must have at least one row"),
        ("rgbnet", with_input("image", 0, 64, 64, 3), "image must have at least one row"),
        ("probe", with_feature(6, 0, 128, 2, 2), "block 6 must have at least one row"),
        ("rgbnet", with_input("image", 2, 0, 64, 3), "multiples of 64 px, got 0×64"),
        ("rgbnet", with_input("image", 2, 64, 100, 3), "multiples of 64 px, got 64×100"),
        ("rgbnet", with_input("image", 2, 3, 64, 64), r"must be \(B, H, W, 3\), got \(2, 3, 64"),
    ],
)
def test_bad_inputs_are_refused(ldm_unet, name, change, message):
    head, batch = make_head(name, ldm_unet), make_inputs(ldm_unet)
    with pytest.raises(ValueError, match=message):
        call(head, change(batch))


@pytest.mark.parametrize(("low", "high"), [(0.0, 255.0), (-1.0, 1.0), (0.0, float("nan"))])
def test_rgbnet_refuses_floats_outside_0_to_1(ldm_unet, low, high):
    head, batch = make_head("rgbnet", ldm_unet), make_inputs(ldm_unet)
    image = torch.full((2, 64, 64, 3), low)
    image[1, 5, 7, 2] = high
    with pytest.raises(ValueError, match=r"a float image must be in 0\.\.1, got .* divide bytes"):
        call(head, {**batch, "image": image})


@torch.no_grad()
def test_features_of_another_ldm_need_the_latents_aspect(ldm_unet):
    head = LDZNet.from_ldm(ldm_unet, size_px=64, blocks=[7], feature_channels={7: 64}).eval()
    batch = make_inputs(ldm_unet, side=(8, 16))
    for sides in ((1, 2), (2, 4), (8, 16), (3, 6)):
        logits = call(head, {**batch, "features": {7: torch.randn(2, 64, *sides)}})
        assert logits.shape == (2, 1, 64, 128)
    for sides in ((4, 2), (4, 4), (1, 4)):
        with pytest.raises(ValueError, match="block 7 must have sides of the same aspect"):
            call(head, {**batch, "features": {7: torch.randn(2, 64, *sides)}})


@torch.no_grad()
def test_a_text_width_listed_for_every_level_is_one_width(ldm_unet):
    config = {**NARROW, "cross_attention_dim": [64] * 4}
    head, batch = ZNet(unet_config=config).eval(), make_inputs(ldm_unet)
    assert call(head, batch).shape == (2, 1, 64, 64)
    with pytest.raises(ValueError, match=r"text must be \(2, tokens, 64\), got \(2, 5, 32\)"):
        call(head, {**batch, "text": torch.zeros(2, 5, 32)})
    with torch.device("meta"), pytest.raises(ValueError, match="cross_attention_dim must be one"):
        ZNet(unet_config={**NARROW, "cross_attention_dim": [64, 64, 32, 64]})


def test_concatenation_refuses_a_feature_of_another_size(ldm_unet):
    arguments = {"fusion": "concatenation", "feature_channels": {6: 64}, "size_px": 64}
    head = LDZNet.from_ldm(ldm_unet, **arguments)
    change = with_feature(6, 2, 64, 4, 4)
    with pytest.raises(ValueError, match=r"block 6: .* own sides \(2, 2\), got \(4, 4\)"):
        call(head, change(make_inputs(ldm_unet)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "sum"}, 'fusion must be "attention" or "concatenation", got \'sum\''),
        ({"size_px": 100}, "size_px must be a positive multiple of 64, got 100"),
        ({"size_px": "64"}, "size_px must be a positive multiple of 64, got '64'"),
        ({"size_px": 384.0}, r"size_px must be a positive multiple of 64, got 384\.0"),
        ({"blocks": 6}, "blocks must be a list of whole numbers.* got 6"),
        ({"blocks": "67"}, "blocks must be a list of whole numbers.* got '67'"),
        ({"blocks": [6.0]}, r"blocks must be a list of whole numbers.* got \[6\.0\]"),
        ({"feature_channels": [1]}, r"feature_channels must be a mapping .* got \[1\]"),
        ({"feature_channels": {"x": 1}}, "feature_channels must have block numbers .* got 'x'"),
        ({"feature_channels": {6: 0}}, "feature_channels of block 6 must be .* got 0"),
        ({"feature_channels": {6: -8}}, "feature_channels of block 6 must be .* got -8"),
        ({"unet_config": [1]}, r"unet_config must be the config of .* got \[1\]"),
        ({"unet_config": {}}, "unet_config must be the config of"),
        ({"unet_config": {**NARROW, "block_out_channels": 5}}, "unet_config must be one .* got Ty"),
        ({"unet_config": {**NARROW, "in_channels": "4"}}, "unet_config must be one that diffusers"),
        ({"unet_config": {**NARROW, "in_channels": -4}}, "unet_config must be one .* RuntimeError"),
        ({"blocks": [7, 17]}, "blocks must be some of 1 to 16"),
        ({"feature_channels": {3: 8}}, r"some of the head's blocks, got \[3\]"),
        ({"feature_channels": {7: 60}}, "multiple of num_heads 8, got 60"),
    ],
)
def test_bad_options_are_refused(options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        LDZNet(**{"unet_config": NARROW, **options})


def test_a_config_of_another_head_or_with_unknown_keys_is_refused():
    with pytest.raises(ValueError, match="\"head\" must be 'rgbnet', got 'znet'"):
        RGBNet.from_config({"head": "znet", "unet_config": NARROW})
    with pytest.raises(ValueError, match=r"must be some of \['unet_config'\], got \['depth'\]"):
        ZNet.from_config({"head": "znet", "unet_config": NARROW, "depth": 2})
    with pytest.raises(ValueError, match="ZNet: config must hold 'unet_config', got only"):
        ZNet.from_config({"head": "znet"})


def test_a_folder_without_a_readable_head_is_refused(ldm_unet, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: expected the config .* got no file"):
        load_head(tmp_path)
    make_head("znet", ldm_unet).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected the weights"):
        load_head(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_text(config.replace('"znet"', '"rgbnet"'))
    with pytest.raises(ValueError, match=r'(?s)expected the weights .* "stem\.0'):
        load_head(tmp_path)
    (tmp_path / "config.json").write_text('{"head": "unet++"}')
    with pytest.raises(ValueError, match=r"must be one of .* got 'unet\+\+'"):
        load_head(tmp_path)


def test_a_bad_config_is_refused_with_its_path_and_key(ldm_unet, tmp_path):
    make_head("ldznet", ldm_unet).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in (("unet_config", [1]), ("blocks", 6), ("feature_channels", [1])):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=rf"config\.json: LDZNet: {key} must be"):
            load_head(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(ldm_unet, tmp_path, value):
    head = make_head("probe", ldm_unet)
    with torch.no_grad():
        head.mix.weight[3, 1, 0, 2] = value
    head.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors: mix\.weight must be finite"):
        load_head(tmp_path)
