"""Keys of checkpoints sorted by model, and the choice between moving averages and raw weights."""

import math

import pytest
import torch

from models.convert.names import ConversionError
from models.convert.sort_keys import FROZEN_PREFIX, sort_keys
from tests.support.ldznet_public import load_make_script, read_shapes, read_values

PREFIXES = pytest.mark.parametrize("prefix", ["", FROZEN_PREFIX])


def make_state(prefix=""):
    """Three of the public names: raw weights are 1, copies 2; counters beside them."""
    state = {}
    for name in list(read_shapes("frozen"))[:3]:
        state[f"{prefix}model.diffusion_model.{name}"] = torch.ones(2)
        copy = f"diffusion_model.{name}".replace(".", "")
        state[f"{prefix}model_ema.{copy}"] = torch.full((2,), 2.0)
    state[f"{prefix}model_ema.decay"] = torch.tensor(0.9999)
    state[f"{prefix}model_ema.num_updates"] = torch.tensor(7, dtype=torch.int)
    if prefix:
        state["model.diffusion_model.final.0.bias"] = torch.ones(1)
    return state


def select(state, **options):
    found = sort_keys(state)
    return found.select_weights("unet", **options), found.account


class TestSelectWeights:
    @PREFIXES
    def test_copies_are_taken(self, prefix):
        state = make_state(prefix)
        weights, account = select(state)
        assert list(weights) == list(read_shapes("frozen"))[:3]
        assert all((weight == 2).all() for weight in weights.values())
        assert account.notes["unet"] == "3 weights, EMA after 7 updates"
        for name, weight in weights.items():
            key = f"{prefix}model_ema.{f'diffusion_model.{name}'.replace('.', '')}"
            assert weight is state[key]
            assert account.converted[key] == "unet"
            raw = account.ignored[f"{prefix}model.diffusion_model.{name}"]
            assert raw == "raw weights of the UNet, whose moving averages are converted"

    def test_raw_weights_where_there_are_no_copies(self):
        state = {k: v for k, v in make_state().items() if not k.startswith("model_ema.")}
        weights, account = select(state)
        assert all((weight == 1).all() for weight in weights.values())
        assert account.ignored == {}
        assert "raw: the checkpoint holds no EMA copies" in account.notes["unet"]

    @PREFIXES
    def test_raw_weights_where_they_are_asked_for(self, prefix):
        weights, account = select(make_state(prefix), raw=True)
        assert all((weight == 1).all() for weight in weights.values())
        assert account.notes["unet"] == "3 weights, raw, not the EMA copies beside them"
        rules = list(account.ignored.values())
        assert rules.count("moving averages of the UNet, whose raw weights are converted") == 3

    def test_a_checkpoint_may_not_say_how_many_updates(self):
        state = make_state()
        del state["model_ema.num_updates"]
        assert "EMA after an unknown number of updates" in select(state)[1].notes["unet"]

    @pytest.mark.parametrize("updates", [[1.0, 2.0], float("nan"), []])
    def test_a_count_of_updates_that_is_none_is_named(self, updates):
        state = make_state() | {"model_ema.num_updates": torch.tensor(updates)}
        with pytest.raises(ConversionError, match=r"model_ema\.num_updates: expected one number"):
            select(state)

    @pytest.mark.parametrize("raw", [True, False])
    def test_a_partial_set_is_refused(self, raw):
        state = make_state()
        del state["model_ema.diffusion_modeltime_embed0bias"]
        with pytest.raises(
            ConversionError, match=r"none of model\.diffusion_model\.time_embed\.0\.bias;"
        ):
            select(state, raw=raw)

    def test_a_copy_of_no_parameter_is_refused(self):
        state = make_state() | {"model_ema.diffusion_modelghost": torch.ones(1)}
        with pytest.raises(ConversionError, match=r"got model_ema\.diffusion_modelghost"):
            select(state)

    def test_one_copy_for_two_parameters_is_refused(self):
        state = {f"model.diffusion_model.{name}": torch.ones(1) for name in ("a.b", "ab")}
        state["model_ema.diffusion_modelab"] = torch.ones(1)
        with pytest.raises(ConversionError, match="two parameters with one copy"):
            select(state)

    def test_a_copy_of_another_shape_is_refused(self):
        state = make_state()
        state["model_ema.diffusion_modeltime_embed0bias"] = torch.ones(3)
        with pytest.raises(ConversionError, match=r"shape \(2,\), got \(3,\)"):
            select(state)

    def test_copies_without_their_unet_are_refused(self):
        state = {k: v for k, v in make_state().items() if k.startswith("model_ema.")}
        with pytest.raises(ConversionError, match="got none among 5 keys"):
            select(state)

    @pytest.mark.parametrize("kind", ["head", "frozen"])
    def test_copies_are_named_as_the_public_ema_names_them(self, kind):
        """The hash is of the buffers of the public code's own EMA class over the same UNet."""
        make = load_make_script()
        names = list(read_shapes(kind))
        expected = read_values()["ema_names_sha256"][kind]
        copies = ["diffusion_model" + name.replace(".", "") for name in names]
        assert make.hash_names([*copies, "decay", "num_updates"]) == expected
        assert len(set(copies)) == len(copies)
        state = {f"model.diffusion_model.{name}": torch.zeros(1) for name in names}
        state |= {f"model_ema.{name}": torch.ones(1) for name in copies}
        weights = sort_keys(state).select_weights("head" if kind == "head" else "unet")
        assert math.prod(float(weight) for weight in weights.values()) == 1.0


def test_a_model_that_is_only_in_part_below_the_frozen_prefix_is_refused():
    state = make_state(FROZEN_PREFIX)
    state |= {f"{FROZEN_PREFIX}first_stage_model.a": torch.ones(1)}
    assert sort_keys(state).prefixes["vae"] == f"{FROZEN_PREFIX}first_stage_model."
    with pytest.raises(ConversionError, match=r"one vae with and without sd_feat.*first_stage_mod"):
        sort_keys(state | {"first_stage_model.b": torch.ones(1)})
