"""The converted head and the frozen UNet against figures of LD-ZNet's public code.

tests/golden/ldznet_public holds what the public code returned for weights that are drawn from
their names; here the same weights are put into a checkpoint, converted, and run by our classes.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from models.convert.head import convert_head
from models.convert.moving_average import prefer_ema
from models.convert.unet_names import ConversionError, read_unet_config, rename_unet
from models.heads.ldznet import LDZNet
from models.heads.registry import load_head
from models.heads.znet import ZNet
from models.ldm.blocks import list_blocks, read_features

GOLDEN = Path(__file__).parents[2] / "golden" / "ldznet_public"
FROZEN = "sd_features_stage_model.model."
LIMIT = 1e-4
"""Largest difference over the largest value, float32; measured: below 1e-5."""


def load_make_script():
    path = GOLDEN.parent / "make_ldznet_public.py"
    spec = importlib.util.spec_from_file_location("make_ldznet_public", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_make_script()


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "values.json").read_text())


@pytest.fixture(scope="module")
def state():
    """A Lightning checkpoint's: the public code runs the head's EMA copies, the frozen UNet raw.

    Those hold the drawn weights, the ones beside them other values.
    """
    state = {name: torch.zeros(1000) for name in ("betas", "alphas_cumprod", "logvar")}
    state["first_stage_model.quant_conv.weight"] = torch.zeros(8, 8, 1, 1)
    state["cond_stage_model.transformer.text_model.final_layer_norm.bias"] = torch.zeros(8)
    for kind, prefix in (("head", ""), ("frozen", FROZEN)):
        for name, weight in make.draw_weights(read_shapes(kind)).items():
            raw, copy = (0.5 - weight, weight) if kind == "head" else (weight, 0.5 - weight)
            state[f"{prefix}model.diffusion_model.{name}"] = raw
            state[f"{prefix}model_ema.diffusion_model{name.replace('.', '')}"] = copy
        state[f"{prefix}model_ema.decay"] = torch.tensor(0.9999)
        state[f"{prefix}model_ema.num_updates"] = torch.tensor(5, dtype=torch.int)
        state[f"{prefix}betas"] = torch.zeros(1000)
    return state


def read_shapes(kind):
    found = json.loads((GOLDEN / "names.json").read_text())[kind]
    return {name: tuple(map(int, shape.split("x"))) for name, shape in found.items()}


@pytest.fixture(scope="module")
def converted(state):
    return convert_head(state)


@pytest.fixture(scope="module")
def inputs(golden):
    return {
        case: make.draw_case(case, make.NARROW_TEXT_WIDTH, golden["batch"])
        for case in golden["cases"]
    }


@pytest.fixture(scope="module")
def features(state, inputs):
    """{case: {block: feature}} of a diffusers UNet with the frozen UNet's converted weights."""
    weights, report = prefer_ema(state, prefix=FROZEN, raw=True)
    assert report.left
    names = rename_unet(weights)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_unet_config(weights))
    unet.load_state_dict({names[name]: weight for name, weight in weights.items()}, assign=True)
    with torch.no_grad():
        return {
            case: read_features(
                unet, drawn.noisy, drawn.timestep, drawn.text, blocks=list_blocks(unet)
            )
            for case, drawn in inputs.items()
        }


def check_sample(ours, expected):
    assert list(ours.shape) == expected["shape"]
    flat = ours.flatten()
    values = flat[make.list_positions(flat.numel())]
    difference = (values - torch.tensor(expected["values"])).abs().max()
    assert difference <= LIMIT * expected["max"]
    assert float(flat.abs().max()) == pytest.approx(expected["max"], rel=LIMIT)
    assert float(flat.std()) == pytest.approx(expected["std"], rel=LIMIT)


@pytest.mark.parametrize("case", make.CASES)
class TestParityWithThePublicCode:
    def test_all_sixteen_features(self, case, golden, features):
        expected = {int(k): v for k, v in golden["cases"][case].items() if k != "logits"}
        assert sorted(features[case]) == sorted(expected) == list(range(1, 17))
        for number, wanted in expected.items():
            check_sample(features[case][number], wanted)

    def test_logits_of_the_head_on_those_features(self, case, golden, features, inputs, converted):
        drawn = inputs[case]
        with torch.no_grad():
            logits = converted.head(latent=drawn.latent, text=drawn.text, features=features[case])
        check_sample(logits, golden["cases"][case]["logits"])


class TestWhatIsConverted:
    def test_head_and_its_options(self, converted):
        assert isinstance(converted.head, LDZNet)
        assert converted.head.config["blocks"] == [6, 7, 8, 9, 10]
        assert converted.head.config["size_px"] == 384
        assert converted.head.config["unet_config"]["out_channels"] == 4

    def test_ema_copies_are_taken_and_said_so(self, converted, state):
        bias = converted.head.final[0].bias
        assert torch.equal(bias, state["model_ema.diffusion_modelfinal0bias"])
        assert not torch.equal(bias, state["model.diffusion_model.final.0.bias"])
        assert converted.ema.used
        assert converted.ema.num_updates == 5

    def test_raw_weights_without_ema(self, state):
        raw = {key: value for key, value in state.items() if not key.startswith("model_ema.")}
        converted = convert_head(raw)
        bias = converted.head.final[0].bias
        assert torch.equal(bias, state["model.diffusion_model.final.0.bias"])
        assert not converted.ema.used
        assert "raw weight" not in " ".join(converted.ignored.values())

    def test_the_account_holds_every_key_once(self, converted, state):
        accounts = (converted.converted, converted.left, converted.ignored)
        assert sorted(key for account in accounts for key in account) == sorted(state)
        parameters = dict(converted.head.named_parameters())
        assert sorted(converted.converted.values()) == sorted(parameters)
        for key, name in converted.converted.items():
            assert torch.equal(state[key], parameters[name]), name
        assert converted.left["first_stage_model.quant_conv.weight"] == "the VAE"
        assert converted.left[f"{FROZEN}betas"] == "the frozen LDM of the features"
        assert "noise schedule" in converted.ignored["betas"]
        assert "EMA copy was taken" in converted.ignored["model.diffusion_model.final.0.bias"]

    def test_a_saved_head_reads_back(self, converted, inputs, features, tmp_path):
        converted.head.save_pretrained(tmp_path)
        loaded = load_head(tmp_path)
        drawn = inputs["16x24"]
        given = {"latent": drawn.latent, "text": drawn.text, "features": features["16x24"]}
        with torch.no_grad():
            assert torch.equal(loaded(**given), converted.head(**given))

    def test_without_added_attention_it_is_a_znet(self, state):
        added = ("attn3", "norm_sd", "attentionpool2D")
        plain = {key: value for key, value in state.items() if not any(a in key for a in added)}
        converted = convert_head(plain, size_px=384)
        assert isinstance(converted.head, ZNet)
        assert sorted(converted.converted.values()) == sorted(
            name for name, _ in converted.head.named_parameters()
        )

    def test_other_blocks_and_another_size_come_from_the_weights(self, state):
        """Block 7's added attention gone, the others' grids learned for 512 px."""
        added = ("attn3", "norm_sd", "attentionpool2D")
        changed = raw_head(state)
        for key in list(changed):
            if "middle_block.1." in key and any(a in key for a in added):
                del changed[key]
            elif key.endswith("positional_embedding"):
                changed[key] = torch.zeros(len(changed[key]), 16**2 + 1)
        head = convert_head(changed).head
        assert head.config["blocks"] == [6, 8, 9, 10]
        assert head.config["size_px"] == 512


def raw_head(state):
    return {key: value for key, value in state.items() if key.startswith("model.diffusion_model.")}


def position(state, place):
    key = f"model.diffusion_model.{place}.attentionpool2D.positional_embedding"
    return key, len(state[key])


def test_a_head_has_one_dtype(state):
    mixed = {k: v.half() if "attn3" in k else v for k, v in raw_head(state).items()}
    converted = convert_head(mixed)
    assert {weight.dtype for weight in converted.head.state_dict().values()} == {torch.float32}
    assert converted.mixed == "float16 and float32 in the file, all float32 here"
    assert convert_head(mixed, dtype=torch.float16).head.final[0].bias.dtype == torch.float16


class TestWhatIsRefused:
    def test_an_unknown_key(self, state):
        with pytest.raises(ConversionError, match=r"got discriminator\.weight"):
            convert_head(state | {"discriminator.weight": torch.zeros(1)})

    def test_many_unknown_keys_are_counted(self, state):
        extra = {f"x{i}": torch.zeros(1) for i in range(9)}
        with pytest.raises(ConversionError, match=r"got x0, x1, x2, x3, x4 and 4 more"):
            convert_head(state | extra)

    def test_an_unknown_name_in_the_unet(self, state):
        extra = {"model.diffusion_model.output_blocks.3.1.gate": torch.zeros(1)}
        with pytest.raises(ConversionError, match=r"got output_blocks\.3\.1\.gate"):
            convert_head(raw_head(state) | extra)

    def test_a_plain_ldm(self, state):
        frozen = {
            key.removeprefix(FROZEN): value
            for key, value in state.items()
            if key.startswith(FROZEN)
        }
        with pytest.raises(ConversionError, match="plain LDM is no head"):
            convert_head(frozen)

    def test_pools_of_different_image_sides(self, state):
        key, channels = position(state, "middle_block.1")
        changed = raw_head(state) | {key: torch.zeros(channels, 8**2 + 1)}
        with pytest.raises(ConversionError, match=r"sides by block \{6: 384, 7: 512, 8: 384"):
            convert_head(changed)

    def test_a_pool_without_a_square_grid(self, state):
        key, channels = position(state, "middle_block.1")
        changed = raw_head(state) | {key: torch.zeros(channels, 7 * 6 + 1)}
        with pytest.raises(ConversionError, match=r"pools\.7\.pos.* square grid.* got 43 tokens"):
            convert_head(changed)

    def test_another_size_than_asked_for(self, state):
        with pytest.raises(ConversionError, match="images of 512 px, got 384 px"):
            convert_head(state, size_px=512)

    @pytest.mark.parametrize(
        "gone", ["final.12.bias", "out.0.bias", "middle_block.1.attentionpool2D.c_proj.bias"]
    )
    def test_a_missing_weight(self, state, gone):
        changed = raw_head(state)
        del changed[f"model.diffusion_model.{gone}"]
        with pytest.raises(ConversionError, match=r"(?s)weights of LDZNet.*Missing key"):
            convert_head(changed)

    def test_weights_that_are_no_finite_floats(self, state):
        key = "model.diffusion_model.final.0.weight"
        good = state[key]
        for wrong in (good * float("nan"), good.to(torch.int8), torch.tensor(1.0)):
            with pytest.raises(ConversionError, match=r"^model\.diffusion_model\.final\.0\.weight"):
                convert_head(raw_head(state) | {key: wrong})

    def test_heads_that_do_not_divide_a_width(self, state):
        with pytest.raises(ConversionError, match="3 attention heads do not divide"):
            convert_head(state, num_heads=3)

    def test_a_pool_without_its_attention(self, state):
        changed = {k: v for k, v in raw_head(state).items() if "middle_block.1.attent" not in k}
        with pytest.raises(ConversionError, match=r"(?s)Unexpected key.*mid_block.*attn3"):
            convert_head(changed)

    def test_attentions_without_any_pool(self, state):
        changed = {k: v for k, v in raw_head(state).items() if "attentionpool2D" not in k}
        with pytest.raises(ConversionError, match="attention pool where there is attn3"):
            convert_head(changed)
