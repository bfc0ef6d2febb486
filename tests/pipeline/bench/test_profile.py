"""The profile: parts that add up, FLOPs that are the model's; never a time."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.heads.registry import HEADS
from models.ldm.files import ModelFilesError
from models.ldm.flops import count_block_flops
from pipeline.base.machine import describe_machine
from pipeline.bench.meter import Meter
from pipeline.bench.profile import (
    ProfileOptions,
    build_ldm,
    build_training_step,
    profile_model,
    read_ldm_configs,
)
from pipeline.spec.blocks import build_empty_unet

pytestmark = pytest.mark.thorough

META = torch.device("meta")
OPTIONS = ProfileOptions(size_px=64, batch=2, device=torch.device("cpu"), repeats=1)


@pytest.fixture(scope="module")
def configs(ldm_folder):
    return read_ldm_configs(str(ldm_folder))


@pytest.fixture(scope="module")
def profiled(configs):
    return profile_model(configs, OPTIONS)


def rows_of(profiled, stage):
    return {row.part: row for row in profiled[0] if row.stage == stage}


def test_shares_of_a_stage_add_up_to_one(profiled):
    for stage in ("encode", "train ldznet"):
        rows = rows_of(profiled, stage).values()
        assert sum(row.share for row in rows) == pytest.approx(1)
        assert all(row.seconds > 0 for row in rows)
    assert [time.stage for time in profiled[1]] == ["encode", "train ldznet"]


def test_encoding_has_every_part_and_the_models_flops(profiled, configs):
    rows = rows_of(profiled, "encode")
    unet = ("residual blocks", "self-attention", "text attention", "feed-forward", "other")
    assert set(rows) == {
        *("VAE encoder", "text encoder", "to float16", "to the host"),
        *(f"UNet: {part}" for part in unet),
    }
    counted = sum(rows[f"UNet: {part}"].gflop for part in unet)
    reached, _ = count_block_flops(build_empty_unet(configs["unet"]), size_px=64)
    assert counted == pytest.approx(2 * reached[10] / 1e9)
    vae = build_ldm(configs, device=META, dtype=torch.float32).vae
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode(torch.empty(2, 3, 64, 64, device=META))
    assert rows["VAE encoder"].gflop == pytest.approx(counter.get_total_flops() / 1e9)
    assert rows["to float16"].gflop is None


def test_a_training_step_has_every_part(profiled):
    rows = rows_of(profiled, "train ldznet")
    assert {part for part in rows if not part.startswith("forward")} == {
        *("loss", "backward", "gradient norm", "optimizer", "averaged weights"),
    }
    assert {"forward: attention pools", "forward: feature attention"} <= set(rows)
    forward = sum(row.gflop for part, row in rows.items() if part.startswith("forward"))
    # gradients of inputs and of weights, each as much as the forward; text and features need none
    assert 1.5 < rows["backward"].gflop / forward < 2


@pytest.mark.parametrize("head", sorted(HEADS))
def test_every_head_has_its_inputs(configs, head):
    step = build_training_step(configs, replace(OPTIONS, head=head), META)
    meter = Meter(lambda: 0.0)
    step(meter)
    assert {"forward: other", "loss", "backward"} <= set(meter.totals)


def test_encoding_alone_in_bfloat16(configs):
    options = replace(OPTIONS, head=None, compute="bfloat16")
    rows, times = profile_model(configs, options)
    assert {row.stage for row in rows} == {"encode"}
    assert "to float16" in {row.part for row in rows}
    assert times[0].fastest_s <= times[0].slowest_s


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"head": "unet"}, "head must be one of .*'ldznet'.* got 'unet'"),
        ({"compute": "int8"}, "compute must be one of .* got 'int8'"),
        ({"size_px": 100}, "size must be a positive multiple of 64 px, got 100"),
        ({"size_px": 0}, "size must be a positive multiple of 64 px, got 0"),
        ({"device": META}, "device must be cpu, cuda or such as cuda:1, got 'meta'"),
        ({"device": torch.device("cuda:99")}, "device is 'cuda:99', but torch sees [0-9]+ of its"),
    ],
)
def test_unknown_options_are_refused(configs, option, message):
    with pytest.raises(ValueError, match=message):
        profile_model(configs, replace(OPTIONS, **option))


def test_a_missing_part_and_sdxl_are_refused_by_name(ldm_folder, tmp_path):
    folder = shutil.copytree(ldm_folder, tmp_path / "ldm")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"addition_embed_type": "text_time"}))
    with pytest.raises(ModelFilesError, match="addition_embed_type 'text_time'"):
        read_ldm_configs(str(folder))
    shutil.rmtree(folder / "vae")
    with pytest.raises(ModelFilesError, match="cannot be read as the VAE's config"):
        read_ldm_configs(str(folder))


def test_the_machine_is_described():
    machine = describe_machine(torch.device("cpu"))
    assert machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == torch.__version__
    assert machine["commit"]
