"""The converted head and the frozen UNet against figures of LD-ZNet's public code.

tests/golden/ldznet_public holds what the public code returned for weights that are drawn from
their names; here the same weights are put into a checkpoint, converted, and run by our classes.
"""

import re

import pytest
import torch
from diffusers import UNet2DConditionModel

from models.convert.head import convert_head
from models.convert.ldm import build_empty, convert_unet
from models.convert.names import ConversionError, map_block_names, map_head_names
from models.convert.sort_keys import FROZEN_PREFIX, sort_keys
from models.heads.ldznet import LDZNet
from models.heads.registry import load_head
from models.heads.znet import ZNet
from models.ldm.blocks import compute_features, list_blocks
from tests.support.ldznet_public import load_make_script, read_shapes, read_values

LIMIT = 1e-4
"""Largest difference over the largest value, float32; measured: below 1e-5."""


make = load_make_script()


@pytest.fixture(scope="module")
def golden():
    return read_values()


@pytest.fixture(scope="module")
def state():
    """A Lightning checkpoint's: the public code runs the head's EMA copies, the frozen UNet raw.

    Those hold the drawn weights, the ones beside them other values.
    """
    state = {name: torch.zeros(1000) for name in ("betas", "alphas_cumprod", "logvar")}
    state["first_stage_model.quant_conv.weight"] = torch.zeros(8, 8, 1, 1)
    state["cond_stage_model.transformer.text_model.final_layer_norm.bias"] = torch.zeros(8)
    for kind, prefix in (("head", ""), ("frozen", FROZEN_PREFIX)):
        for name, weight in make.draw_weights(read_shapes(kind)).items():
            raw, copy = (0.5 - weight, weight) if kind == "head" else (weight, 0.5 - weight)
            state[f"{prefix}model.diffusion_model.{name}"] = raw
            state[f"{prefix}model_ema.diffusion_model{name.replace('.', '')}"] = copy
        state[f"{prefix}model_ema.decay"] = torch.tensor(0.9999)
        state[f"{prefix}model_ema.num_updates"] = torch.tensor(5, dtype=torch.int)
        state[f"{prefix}betas"] = torch.zeros(1000)
    return state


def convert(state, **options):
    """Return the head of a checkpoint, and the account of the keys that are its own."""
    found = sort_keys(state)
    return convert_head(found, **options), found


@pytest.fixture(scope="module")
def converted(state):
    return convert(state)


@pytest.fixture(scope="module")
def head(converted):
    return converted[0]


@pytest.fixture(scope="module")
def inputs(golden):
    return {
        case: make.draw_case(case, make.NARROW_TEXT_WIDTH, golden["batch"])
        for case in golden["cases"]
    }


@pytest.fixture(scope="module")
def features(state, inputs):
    """{case: {block: feature}} of a diffusers UNet with the frozen UNet's converted weights."""
    found = sort_keys(state)
    model = convert_unet(found.select_weights("unet", raw=True))
    assert "not the EMA copies beside them" in found.account.notes["unet"]
    unet = build_empty("unet", UNet2DConditionModel, model.config)
    unet.load_state_dict(model.weights, assign=True)
    with torch.no_grad():
        return {
            case: compute_features(
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

    def test_logits_of_the_head_on_those_features(self, case, golden, features, inputs, head):
        drawn = inputs[case]
        with torch.no_grad():
            logits = head(latent=drawn.latent, text=drawn.text, features=features[case])
        check_sample(logits, golden["cases"][case]["logits"])


class TestWhatIsConverted:
    def test_head_and_its_options(self, head):
        assert isinstance(head, LDZNet)
        assert head.config["blocks"] == [6, 7, 8, 9, 10]
        assert head.config["size_px"] == 384
        assert head.config["unet_config"]["out_channels"] == 4

    def test_ema_copies_are_taken_and_said_so(self, converted, state):
        head, found = converted
        bias = head.final[0].bias
        assert torch.equal(bias, state["model_ema.diffusion_modelfinal0bias"])
        assert not torch.equal(bias, state["model.diffusion_model.final.0.bias"])
        assert found.account.notes["head"].endswith(" weights, EMA after 5 updates")

    def test_raw_weights_without_ema(self, state):
        raw = {key: value for key, value in state.items() if not key.startswith("model_ema.")}
        head, found = convert(raw)
        bias = head.final[0].bias
        assert torch.equal(bias, state["model.diffusion_model.final.0.bias"])
        assert "raw: the checkpoint holds no EMA copies" in found.account.notes["head"]
        assert "raw weights" not in " ".join(found.account.ignored.values())

    def test_the_account_holds_every_key_once(self, converted, state):
        head, found = converted
        left = [key for model, keys in found.keys.items() if model != "head" for key in keys]
        accounts = (found.account.converted, left, found.account.ignored)
        counters = [key for key in left if key in found.account.ignored]
        assert counters == []
        assert sorted(key for account in accounts for key in account) == sorted(state)
        parameters = dict(head.named_parameters())
        unet = build_empty("unet", UNet2DConditionModel, head.config["unet_config"])
        names = map_head_names(parameters, map_block_names(unet))
        assert sorted(names) == sorted(parameters)
        for name, weight in parameters.items():
            key = f"model_ema.{f'diffusion_model.{names[name]}'.replace('.', '')}"
            assert found.account.converted[key] == "head"
            assert torch.equal(state[key], weight), name
        assert found.keys["vae"] == ["first_stage_model.quant_conv.weight"]
        assert "diffusion schedule" in found.account.ignored["betas"]
        assert "diffusion schedule" in found.account.ignored[f"{FROZEN_PREFIX}betas"]
        raw = found.account.ignored["model.diffusion_model.final.0.bias"]
        assert raw == "raw weights of the UNet, whose moving averages are converted"

    def test_a_saved_head_reads_back(self, head, inputs, features, tmp_path):
        head.save_pretrained(tmp_path)
        loaded = load_head(tmp_path)
        drawn = inputs["16x24"]
        given = {"latent": drawn.latent, "text": drawn.text, "features": features["16x24"]}
        with torch.no_grad():
            assert torch.equal(loaded(**given), head(**given))

    def test_without_added_attention_it_is_a_znet(self, state):
        added = ("attn3", "norm_sd", "attentionpool2D")
        plain = {key: value for key, value in state.items() if not any(a in key for a in added)}
        head, found = convert(plain)
        assert isinstance(head, ZNet)
        num_converted = list(found.account.converted.values()).count("head")
        assert num_converted == len(list(head.named_parameters()))

    def test_other_blocks_and_another_size_come_from_the_weights(self, state):
        """Block 7's added attention gone, the others' grids learned for 512 px."""
        added = ("attn3", "norm_sd", "attentionpool2D")
        changed = raw_head(state)
        for key in list(changed):
            if "middle_block.1." in key and any(a in key for a in added):
                del changed[key]
            elif key.endswith("positional_embedding"):
                changed[key] = torch.zeros(len(changed[key]), 16**2 + 1)
        head, _ = convert(changed)
        assert head.config["blocks"] == [6, 8, 9, 10]
        assert head.config["size_px"] == 512


def raw_head(state):
    return {key: value for key, value in state.items() if key.startswith("model.diffusion_model.")}


def position(state, place):
    key = f"model.diffusion_model.{place}.attentionpool2D.positional_embedding"
    return key, len(state[key])


def test_a_head_has_one_dtype(state):
    mixed = {k: v.half() if "attn3" in k else v for k, v in raw_head(state).items()}
    head, found = convert(mixed)
    assert {weight.dtype for weight in head.state_dict().values()} == {torch.float32}
    note = found.account.notes["head"]
    assert note.endswith("; float16 and float32 in the file, all float32 here")
    assert convert(mixed, dtype=torch.float16)[0].final[0].bias.dtype == torch.float16


class TestWhatIsRefused:
    def test_an_unknown_key(self, state):
        with pytest.raises(ConversionError, match=r"no known model: discriminator\.weight;"):
            convert(state | {"discriminator.weight": torch.zeros(1)})

    def test_many_unknown_keys_are_counted(self, state):
        extra = {f"x{i}": torch.zeros(1) for i in range(9)}
        with pytest.raises(
            ConversionError, match=r"9 keys are of .*: x0, x1, x2, x3, x4 and 4 more"
        ):
            convert(state | extra)

    def test_an_unknown_name_in_the_unet(self, state):
        extra = {"model.diffusion_model.output_blocks.3.1.gate": torch.zeros(1)}
        with pytest.raises(ConversionError, match=r"has 1: .*output_blocks\.3\.1\.gate besides"):
            convert(raw_head(state) | extra)

    def test_a_plain_ldm(self, state):
        frozen = {
            key.removeprefix(FROZEN_PREFIX): value
            for key, value in state.items()
            if key.startswith(FROZEN_PREFIX)
        }
        with pytest.raises(ConversionError, match="plain LDM is no head"):
            convert(frozen)

    def test_pools_of_different_image_sides(self, state):
        key, channels = position(state, "middle_block.1")
        changed = raw_head(state) | {key: torch.zeros(channels, 8**2 + 1)}
        with pytest.raises(ConversionError, match=r"sides by block \{6: 384, 7: 512, 8: 384"):
            convert(changed)

    def test_a_pool_without_a_square_grid(self, state):
        key, channels = position(state, "middle_block.1")
        changed = raw_head(state) | {key: torch.zeros(channels, 7 * 6 + 1)}
        with pytest.raises(
            ConversionError, match=r"middle_block\.1\..*pos.* square grid.* got 43 tokens"
        ):
            convert(changed)

    @pytest.mark.parametrize(
        "gone", ["final.12.bias", "out.0.bias", "middle_block.1.attentionpool2D.c_proj.bias"]
    )
    def test_a_missing_weight(self, state, gone):
        changed = raw_head(state)
        del changed[f"model.diffusion_model.{gone}"]
        with pytest.raises(
            ConversionError, match=rf"head \(LDZNet\): .*lacks 1: .*{re.escape(gone)};"
        ):
            convert(changed)

    def test_weights_that_are_no_finite_floats(self, state):
        key = "model.diffusion_model.final.0.weight"
        good = state[key]
        for wrong in (good * float("nan"), good.to(torch.int8), torch.tensor(1.0)):
            with pytest.raises(ConversionError, match=r"^model\.diffusion_model\.final\.0\.weight"):
                convert(raw_head(state) | {key: wrong})

    def test_heads_that_do_not_divide_a_width(self, state):
        with pytest.raises(ConversionError, match="3 attention heads do not divide"):
            convert(state, num_heads=3)

    def test_a_pool_without_its_attention(self, state):
        changed = {k: v for k, v in raw_head(state).items() if "middle_block.1.attent" not in k}
        with pytest.raises(ConversionError, match=r"has \d+: .*middle_block\.1.*attn3.* besides"):
            convert(changed)

    def test_attentions_without_any_pool(self, state):
        changed = {k: v for k, v in raw_head(state).items() if "attentionpool2D" not in k}
        with pytest.raises(ConversionError, match="attention pool where there is attn3"):
            convert(changed)
