"""CompVis names: against the public code's own list of names, and against diffusers' UNets."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from models.convert.configs import read_unet_config
from models.convert.ldm import build_empty, convert_unet
from models.convert.names import (
    ConversionError,
    map_block_names,
    map_head_names,
    map_unet_names,
)
from models.heads.ldznet import LDZNet
from tests.support.ldznet_public import read_shapes

WIDTH, TEXT_WIDTH = 32, 48


def meta_state(kind):
    return {name: torch.empty(shape, device="meta") for name, shape in read_shapes(kind).items()}


def build_on_meta(build):
    with torch.device("meta"):
        return {name: tuple(weight.shape) for name, weight in build().state_dict().items()}


def number_compvis(levels, layers, attends):
    """CompVis modules in the order of its constructor: {"input_blocks.1.0": "resnet", …}."""
    modules, number = {"input_blocks.0.0": "conv"}, 1
    for level in range(levels):
        for _ in range(layers):
            modules[f"input_blocks.{number}.0"] = "resnet"
            if attends[level]:
                modules[f"input_blocks.{number}.1"] = "transformer"
            number += 1
        if level < levels - 1:
            modules[f"input_blocks.{number}.0"] = "downsampler"
            number += 1
    for i, kind in enumerate(("resnet", "transformer", "resnet")):
        modules[f"middle_block.{i}"] = kind
    number = 0
    for level in reversed(range(levels)):
        for layer in range(layers + 1):
            kinds = ["resnet"] + ["transformer"] * attends[level]
            kinds += ["upsampler"] * (level > 0 and layer == layers)
            modules |= {f"output_blocks.{number}.{i}": kind for i, kind in enumerate(kinds)}
            number += 1
    return modules


def list_inner(kind, place, public):
    """Names inside a module, as the public UNet has them; all have the optional skip here."""
    samples = {
        "conv": "input_blocks.0.0",
        "resnet": "output_blocks.0.0",
        "transformer": "input_blocks.1.1",
        "downsampler": "input_blocks.3.0",
        "upsampler": "output_blocks.5.2",
    }
    sample = samples[kind]
    return [place + name.removeprefix(sample) for name in public if name.startswith(sample + ".")]


class TestNames:
    def test_public_sd_unet_gets_diffusers_names_and_shapes(self):
        model = convert_unet(meta_state("frozen"))
        found = {name: tuple(weight.shape) for name, weight in model.weights.items()}
        assert found == build_on_meta(lambda: UNet2DConditionModel.from_config(model.config))

    def test_public_head_gets_our_names_and_shapes(self):
        state = meta_state("head")
        config = read_unet_config(state)
        assert config["out_channels"] == 1
        with torch.device("meta"):
            head = LDZNet(unet_config=config)
        places = map_block_names(build_empty("unet", UNet2DConditionModel, config))
        names = map_head_names(head.state_dict(), places)
        ours = {names[name]: tuple(weight.shape) for name, weight in head.state_dict().items()}
        assert ours == read_shapes("head")

    @pytest.mark.parametrize(
        ("place", "number"),
        [
            ("input_blocks.8.1", 6),
            ("middle_block.1", 7),
            ("output_blocks.3.1", 8),
            ("output_blocks.4.1", 9),
            ("output_blocks.5.1", 10),
        ],
    )
    def test_pools_carry_the_papers_block_numbers(self, place, number):
        unet = build_empty("unet", UNet2DConditionModel, read_unet_config(meta_state("frozen")))
        names = map_head_names([f"pools.{number}.c_proj.bias"], map_block_names(unet))
        assert names[f"pools.{number}.c_proj.bias"] == f"{place}.attentionpool2D.c_proj.bias"
        assert f"{place}.attentionpool2D.c_proj.bias" in read_shapes("head")

    @settings(max_examples=12, deadline=None)
    @given(data=st.data())
    def test_any_depth_maps_onto_a_diffusers_unet(self, data):
        levels = data.draw(st.integers(1, 4))
        layers = data.draw(st.integers(1, 3))
        attends = data.draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
        public = read_shapes("frozen")
        names = [name for name in public if name.startswith(("time_embed", "out."))]
        for place, kind in number_compvis(levels, layers, attends).items():
            names += list_inner(kind, place, public)
        down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends]
        up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                block_out_channels=[32] * levels,
                layers_per_block=layers,
                down_block_types=down,
                up_block_types=up,
                cross_attention_dim=TEXT_WIDTH,
                attention_head_dim=8,
            )
        weights = unet.state_dict()
        found = map_unet_names(weights)
        assert len(set(found.values())) == len(weights)
        # The names above give every residual block a skip convolution; diffusers has fewer here.
        assert {name for name in found.values() if "skip_connection" not in name} == {
            name for name in names if "skip_connection" not in name
        }
        assert set(found.values()) <= set(names)
        config = read_unet_config({found[name]: weight for name, weight in weights.items()})
        keys = ("block_out_channels", "layers_per_block", "down_block_types", "up_block_types")
        assert {key: config[key] for key in keys} == {key: list_or_int(unet, key) for key in keys}

    @pytest.mark.parametrize(
        "name",
        [
            "input_blocks.1.0.in_layers.1.weight",
            "input_blocks.1.1.qkv.weight",
            "input_blocks.1.1.transformer_blocks.1.norm1.weight",
            "input_blocks.1.1.attn4.to_q.weight",
            "out.3.weight",
            "final.1.weight",
            "id_predictor.0.weight",
            "weight",
        ],
    )
    def test_an_unknown_name_is_named(self, name):
        state = meta_state("frozen") | {name: torch.empty(1, device="meta")}
        with pytest.raises(ConversionError, match=rf"^unet: .* has 1: {name} besides"):
            convert_unet(state)

    def test_class_conditional_unet_is_refused(self):
        state = meta_state("frozen") | {"label_emb.weight": torch.empty(1, device="meta")}
        with pytest.raises(ConversionError, match=r"label_emb.*class-conditional"):
            convert_unet(state)

    @pytest.mark.parametrize(
        ("gone", "message"),
        [
            ("input_blocks.5.", r"lacks \d+: input_blocks\.5\.0\.emb_layers\.1\.bias"),
            ("input_blocks.5.1.", r"lacks \d+: input_blocks\.5\.1\.norm\.bias"),
            ("input_blocks.11.", r"lacks \d+: input_blocks\.11\.0\.emb_layers"),
            ("middle_block.", r"lacks middle_block\.1\..*; is the file whole"),
            ("middle_block.1.", r"lacks middle_block\.1\..*; is the file whole"),
            ("output_blocks.11.", r"lacks \d+: output_blocks\.11\.0\.emb_layers"),
            ("output_blocks.5.2.", r"lacks 2: output_blocks\.5\.2\.conv\.bias"),
            ("output_blocks.5.1.", r"lacks \d+: output_blocks\.5\.1\.norm\.bias"),
        ],
    )
    def test_a_stage_that_is_not_there_is_named(self, gone, message):
        state = {k: v for k, v in meta_state("frozen").items() if not k.startswith(gone)}
        with pytest.raises(ConversionError, match=message):
            convert_unet(state)


def list_or_int(unet, key):
    value = unet.config[key]
    return value if isinstance(value, int) else list(value)


class TestReadUnetConfig:
    def test_sd_1_4_config_from_the_weights(self):
        config = read_unet_config(meta_state("frozen"))
        assert config["block_out_channels"] == [WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH]
        assert config["cross_attention_dim"] == TEXT_WIDTH
        assert (config["in_channels"], config["out_channels"]) == (4, 4)
        assert config["layers_per_block"] == 2
        assert config["down_block_types"] == [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"]
        assert config["up_block_types"] == ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3]
        assert config["attention_head_dim"] == 8
        assert not config["use_linear_projection"]

    def test_sd_2_projections(self):
        state = meta_state("frozen")
        for name, weight in state.items():
            if name.endswith(("proj_in.weight", "proj_out.weight")):
                state[name] = weight[:, :, 0, 0]
        model = convert_unet(state)
        assert model.config["use_linear_projection"]
        wanted = build_on_meta(lambda: UNet2DConditionModel.from_config(model.config))
        assert {n: tuple(weight.shape) for n, weight in model.weights.items()} == wanted

    def test_a_missing_weight_is_named(self):
        state = meta_state("frozen")
        del state["out.2.weight"]
        with pytest.raises(ConversionError, match=r"lacks out\.2\.weight"):
            read_unet_config(state)

    @pytest.mark.parametrize("heads", [3, 64, 0])
    def test_heads_that_do_not_divide_the_widths_are_refused(self, heads):
        with pytest.raises(ConversionError, match="attention heads do not"):
            read_unet_config(meta_state("frozen"), num_heads=heads)

    def test_a_weight_of_other_dimensions_is_named(self):
        state = meta_state("frozen") | {"out.2.weight": torch.empty((), device="meta")}
        with pytest.raises(ConversionError, match=r"out\.2\.weight must have 4 dimensions"):
            read_unet_config(state)
