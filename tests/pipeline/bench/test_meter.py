"""The meter: every unit is charged once, to the innermost part."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from models.heads.ldznet import LDZNet
from pipeline.bench.meter import Meter, find_parts

pytestmark = pytest.mark.thorough


class Ticks:
    """Advances by one a reading."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_an_inner_part_is_charged_instead_of_the_outer():
    ticks = Ticks()
    meter = Meter(ticks)
    with meter.part("outer"):
        with meter.part("inner"):
            pass
        with meter.part("inner"):
            pass
    assert meter.totals == {"outer": 3.0, "inner": 2.0}
    assert sum(meter.totals.values()) == ticks.now - 1


def test_a_pass_that_is_cut_off_leaves_no_part_open():
    meter = Meter(Ticks())
    layer = nn.Identity()

    def fail(module, args, output):
        raise RuntimeError("cut off")

    layer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="cut off"):
        with meter.part("outer"), meter.watch({"layer": [layer]}):
            layer(torch.zeros(1))
    with meter.part("next"):
        pass
    assert meter.totals == {"outer": 1.0, "layer": 1.0, "next": 1.0}


def test_watched_modules_keep_no_hook():
    layer = nn.Identity()
    with Meter(Ticks()).watch({"layer": [layer]}):
        assert layer._forward_pre_hooks
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks


def test_parts_of_ldznet_are_all_found(ldm_folder):
    config = UNet2DConditionModel.load_config(ldm_folder, subfolder="unet")
    with torch.device("meta"):
        head = LDZNet(unet_config=config, size_px=64)
    counts = {part: len(modules) for part, modules in find_parts(head, prefix="").items()}
    assert counts == {
        "residual blocks": 22,
        "self-attention": 16,
        "text attention": 16,
        "feature attention": 5,
        "feed-forward": 16,
        "attention pools": 5,
        "final": 1,
    }
