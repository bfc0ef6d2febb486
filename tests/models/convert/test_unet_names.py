"""CompVis names: against the public code's own list of names, and against diffusers' UNets."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from models.convert.moving_average import prefer_ema
from models.convert.unet_names import HEAD_LEVEL, ConversionError, read_unet_config, rename_unet
from models.heads.ldznet import LDZNet

GOLDEN = Path(__file__).parents[2] / "golden" / "ldznet_public"
WIDTH, TEXT_WIDTH = 32, 48


def read_public_shapes(kind):
    """{name: shape} of the public code's ``head`` or ``frozen`` UNet."""
    found = json.loads((GOLDEN / "names.json").read_text())[kind]
    return {name: tuple(map(int, shape.split("x"))) for name, shape in found.items()}


def meta_state(kind):
    return {
        name: torch.empty(shape, device="meta") for name, shape in read_public_shapes(kind).items()
    }


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


class TestRenameUnet:
    def test_public_sd_unet_gets_diffusers_names_and_shapes(self):
        state = meta_state("frozen")
        config = read_unet_config(state)
        names = rename_unet(state)
        found = {names[name]: tuple(weight.shape) for name, weight in state.items()}
        assert found == build_on_meta(lambda: UNet2DConditionModel.from_config(config))

    def test_public_head_gets_our_names_and_shapes(self):
        state = meta_state("head")
        config = read_unet_config(state)
        assert config["out_channels"] == 1
        names = rename_unet(state)
        found = {
            new if new.startswith(HEAD_LEVEL) else f"unet.{new}": tuple(state[name].shape)
            for name, new in names.items()
        }
        assert found == build_on_meta(lambda: LDZNet(unet_config=config))

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
        names = rename_unet(read_public_shapes("head"))
        assert names[f"{place}.attentionpool2D.c_proj.bias"] == f"pools.{number}.c_proj.bias"

    @settings(max_examples=12, deadline=None)
    @given(data=st.data())
    def test_any_depth_maps_onto_a_diffusers_unet(self, data):
        levels = data.draw(st.integers(1, 4))
        layers = data.draw(st.integers(1, 3))
        attends = data.draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
        public = read_public_shapes("frozen")
        names = [name for name in public if name.startswith(("time_embed", "out."))]
        for place, kind in number_compvis(levels, layers, attends).items():
            names += list_inner(kind, place, public)
        down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends]
        up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]
        wanted = build_on_meta(
            lambda: UNet2DConditionModel(
                block_out_channels=[32] * levels,
                layers_per_block=layers,
                down_block_types=down,
                up_block_types=up,
                cross_attention_dim=TEXT_WIDTH,
                attention_head_dim=8,
            )
        )
        found = set(rename_unet(names).values())
        # The names above give every residual block a skip convolution; diffusers has fewer here.
        assert {name for name in found if "conv_shortcut" not in name} == {
            name for name in wanted if "conv_shortcut" not in name
        }
        assert set(wanted) <= found

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
        with pytest.raises(ConversionError, match=rf"got {name}"):
            rename_unet([*read_public_shapes("head"), name])

    def test_class_conditional_unet_is_refused(self):
        with pytest.raises(ConversionError, match=r"label_emb.*class-conditional"):
            rename_unet([*read_public_shapes("frozen"), "label_emb.weight"])

    @pytest.mark.parametrize(
        ("gone", "message"),
        [
            ("input_blocks.5.", "expected input_blocks.5, got no weight"),
            ("input_blocks.5.1.", "alike within a level"),
            ("input_blocks.11.", "as many in each"),
            ("middle_block.", "expected middle_block"),
            ("middle_block.1.", "middle_block: expected resnet, transformer, resnet"),
            ("output_blocks.11.", "expected 4 levels of 3, got 11"),
            ("output_blocks.5.2.", r"output_blocks.5: expected .*upsampler"),
            ("output_blocks.5.1.", r"output_blocks.5: expected .*nothing"),
        ],
    )
    def test_stages_that_make_no_unet_are_refused(self, gone, message):
        names = [name for name in read_public_shapes("frozen") if not name.startswith(gone)]
        with pytest.raises(ConversionError, match=message):
            rename_unet(names)


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

    def test_sd_2_projections_and_heads(self):
        state = meta_state("frozen")
        for name, weight in state.items():
            if name.endswith(("proj_in.weight", "proj_out.weight")):
                state[name] = weight[:, :, 0, 0]
        config = read_unet_config(state, num_heads=(4, 8, 16, 16))
        assert config["use_linear_projection"]
        assert config["attention_head_dim"] == [4, 8, 16, 16]
        wanted = build_on_meta(
            lambda: UNet2DConditionModel.from_config(config | {"attention_head_dim": 8})
        )
        names = rename_unet(state)
        assert {names[n]: tuple(weight.shape) for n, weight in state.items()} == wanted

    def test_a_missing_weight_is_named(self):
        state = meta_state("frozen")
        del state["out.2.weight"]
        with pytest.raises(ConversionError, match=r"expected a weight out\.2\.weight"):
            read_unet_config(state)

    @pytest.mark.parametrize("heads", [3, 64, (8, 8, 8, 24), (8, 8), 0])
    def test_heads_that_do_not_divide_the_widths_are_refused(self, heads):
        with pytest.raises(ConversionError, match=r"attention heads do not|heads for 4 levels"):
            read_unet_config(meta_state("frozen"), num_heads=heads)

    def test_a_weight_of_other_dimensions_is_named(self):
        state = meta_state("frozen") | {"out.2.weight": torch.empty((), device="meta")}
        with pytest.raises(ConversionError, match=r"out\.2\.weight must have 4 dimensions"):
            read_unet_config(state)


class TestPreferEma:
    PREFIX = "sd_features_stage_model.model."

    def make_state(self, prefix=""):
        """Three of the public names: raw weights are 1, copies 2; counters beside them."""
        state = {}
        for name in list(read_public_shapes("frozen"))[:3]:
            state[f"{prefix}model.diffusion_model.{name}"] = torch.ones(2)
            copy = f"diffusion_model.{name}".replace(".", "")
            state[f"{prefix}model_ema.{copy}"] = torch.full((2,), 2.0)
        state[f"{prefix}model_ema.decay"] = torch.tensor(0.9999)
        state[f"{prefix}model_ema.num_updates"] = torch.tensor(7, dtype=torch.int)
        return state

    @pytest.mark.parametrize("prefix", ["", PREFIX])
    def test_copies_are_taken(self, prefix):
        state = self.make_state(prefix)
        weights, report = prefer_ema(state, prefix=prefix)
        assert list(weights) == list(read_public_shapes("frozen"))[:3]
        assert all((weight == 2).all() for weight in weights.values())
        assert report.used
        assert report.num_updates == 7
        assert str(report) == "3 weights, EMA after 7 updates"
        assert all(weights[name] is state[key] for name, key in report.sources.items())

    def test_raw_weights_where_there_are_no_copies(self):
        state = {k: v for k, v in self.make_state().items() if not k.startswith("model_ema.")}
        weights, report = prefer_ema(state)
        assert all((weight == 1).all() for weight in weights.values())
        assert not report.used
        assert "raw: the checkpoint holds no EMA copies" in str(report)

    @pytest.mark.parametrize("prefix", ["", PREFIX])
    def test_raw_weights_where_they_are_asked_for(self, prefix):
        weights, report = prefer_ema(self.make_state(prefix), prefix=prefix, raw=True)
        assert all((weight == 1).all() for weight in weights.values())
        assert not report.used
        assert str(report) == "3 weights, raw, not the EMA copies beside them"

    @pytest.mark.parametrize("updates", [[1.0, 2.0], float("nan"), []])
    def test_a_count_of_updates_that_is_none_is_named(self, updates):
        state = self.make_state() | {"model_ema.num_updates": torch.tensor(updates)}
        with pytest.raises(ConversionError, match=r"model_ema\.num_updates: expected one number"):
            prefer_ema(state)

    def test_a_partial_set_is_refused(self):
        state = self.make_state()
        del state["model_ema.diffusion_modeltime_embed0bias"]
        with pytest.raises(
            ConversionError, match=r"none of model\.diffusion_model\.time_embed\.0\.bias;"
        ):
            prefer_ema(state)

    def test_a_copy_of_no_parameter_is_refused(self):
        state = self.make_state() | {"model_ema.diffusion_modelghost": torch.ones(1)}
        with pytest.raises(ConversionError, match=r"got model_ema\.diffusion_modelghost"):
            prefer_ema(state)

    def test_one_copy_for_two_parameters_is_refused(self):
        state = {f"model.diffusion_model.{name}": torch.ones(1) for name in ("a.b", "ab")}
        state["model_ema.diffusion_modelab"] = torch.ones(1)
        with pytest.raises(ConversionError, match="two parameters with one copy"):
            prefer_ema(state)

    def test_a_copy_of_another_shape_is_refused(self):
        state = self.make_state()
        state["model_ema.diffusion_modeltime_embed0bias"] = torch.ones(3)
        with pytest.raises(ConversionError, match=r"shape \(2,\), got \(3,\)"):
            prefer_ema(state)

    def test_no_unet_there(self):
        with pytest.raises(ConversionError, match="got none among 8 keys"):
            prefer_ema(self.make_state(), prefix=self.PREFIX)

    @pytest.mark.parametrize("kind", ["head", "frozen"])
    def test_copies_are_named_as_the_public_ema_names_them(self, kind):
        """The hash is of the buffers of the public code's own EMA class over the same UNet."""
        make = load_make_script()
        shapes = read_public_shapes(kind)
        expected = json.loads((GOLDEN / "values.json").read_text())["ema_names_sha256"][kind]
        copies = ["diffusion_model" + name.replace(".", "") for name in shapes]
        assert make.hash_names([*copies, "decay", "num_updates"]) == expected
        assert len(set(copies)) == len(copies)
        state = {f"model.diffusion_model.{name}": torch.zeros(1) for name in shapes}
        state |= {f"model_ema.{name}": torch.ones(1) for name in copies}
        assert math.prod(float(w) for w in prefer_ema(state)[0].values()) == 1.0


def load_make_script():
    path = GOLDEN.parent / "make_ldznet_public.py"
    spec = importlib.util.spec_from_file_location("make_ldznet_public", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
