"""The probe: what it reads, how large it is, and that it learns what a feature holds."""

import json

import pytest
import torch
from torch.nn import functional as F

from models.heads.inputs import FeatureArray, HeadInputs, LDMNetwork, describe_inputs
from models.heads.options import ProbeOptions
from models.heads.probe import ProbeHead
from models.heads.registry import load_head

BLOCKS = {3: (16, 2), 7: (32, 8)}


def make_features(height=8, width=8, batch=2):
    torch.manual_seed(1)
    return {
        number: torch.randn(batch, channels, height // scale, width // scale)
        for number, (channels, scale) in BLOCKS.items()
    }


def make_probe(**options):
    torch.manual_seed(2)
    return ProbeHead(blocks=BLOCKS, **options)


@pytest.mark.parametrize("side", [(8, 8), (8, 16), (24, 8)])
def test_logits_have_the_images_size_and_start_near_zero(side):
    logits = make_probe()(features=make_features(*side))
    assert logits.shape == (2, 1, 8 * side[0], 8 * side[1])
    assert 0 < logits.abs().max() < 0.1


def test_every_block_is_read_and_others_are_not():
    probe, features = make_probe(), make_features()
    before = probe(features=features)
    for number in BLOCKS:
        changed = {**features, number: torch.randn_like(features[number])}
        assert not torch.equal(probe(features=changed), before)
    assert torch.equal(probe(features={**features, 9: torch.zeros(2, 1, 1, 1)}), before)


@pytest.mark.parametrize("factor", [1e-2, 1e3])
def test_a_features_scale_is_not_read(factor):
    probe, features = make_probe(), make_features()
    scaled = {number: factor * feature for number, feature in features.items()}
    torch.testing.assert_close(
        probe(features=scaled), probe(features=features), rtol=5e-2, atol=1e-3
    )


def test_it_starts_at_the_prior():
    probe = make_probe()
    probe.start_at_prior(0.1)
    probability = torch.sigmoid(probe(features=make_features()))
    torch.testing.assert_close(probability, torch.full_like(probability, 0.1), rtol=0, atol=0.01)


def test_it_learns_a_mask_that_a_channel_holds():
    torch.manual_seed(0)
    feature = torch.randn(16, 32, 4, 4)
    mask = F.interpolate((feature[:, 5:6] > 0).float(), scale_factor=16)
    probe = ProbeHead(blocks={7: (32, 2)})
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3)
    for _ in range(60):
        logits = probe(features={7: feature})
        loss = F.binary_cross_entropy_with_logits(logits, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((logits > 0) == (mask > 0)).float().mean() > 0.85


def test_a_saved_probe_is_the_same_again(tmp_path):
    probe, features = make_probe(width=8).eval(), make_features()
    probe.save_pretrained(tmp_path)
    loaded = load_head(tmp_path)
    assert loaded.config == probe.config == json.loads(json.dumps(probe.config))
    assert all(torch.equal(loaded.state_dict()[key], x) for key, x in probe.state_dict().items())
    torch.testing.assert_close(loaded(features=features), probe(features=features))


def test_a_grid_keeps_no_finer_detail_than_its_own(tmp_path):
    """Block 3 has 4×4 positions: what moves within a cell of 2×2 is averaged away."""
    probe, features = make_probe(grid=2).eval(), make_features()
    torch.nn.init.normal_(probe.last.weight)
    within = features | {3: features[3][..., [1, 0, 3, 2]]}
    between = features | {3: features[3][..., [2, 3, 0, 1]]}
    with torch.no_grad():
        before = probe(features=features)
        assert before.shape == make_probe()(features=features).shape
        torch.testing.assert_close(probe(features=within), before)
        assert not torch.allclose(probe(features=between), before, atol=1e-3)
    probe.save_pretrained(tmp_path)
    assert load_head(tmp_path).grid == 2


def test_a_grid_finer_than_a_feature_changes_nothing():
    features = make_features()
    torch.testing.assert_close(
        make_probe(grid=99)(features=features), make_probe()(features=features)
    )


@pytest.mark.parametrize("grid", [0, -1, 1.5])
def test_a_grid_must_be_positive(grid):
    with pytest.raises(ValueError, match="grid must be positive or None"):
        make_probe(grid=grid)


def test_channels_and_downscales_are_those_of_the_layers():
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "norm_num_groups": 8,
    }
    inputs = describe_inputs(config, [2, 3], view_px=64, num_draws=5)
    block = FeatureArray(channels=32, height=4, width=4, draws=5)
    assert inputs == HeadInputs(64, 8, 4, 8, None, {2: block, 3: block})

    def load():
        raise AssertionError("a probe needs no weights of the LDM")

    options = ProbeOptions(blocks=(2, 3), width=8, grid=2)
    probe = ProbeHead.from_layers(inputs, LDMNetwork(config, load), options)
    assert probe.config == {
        "head": "probe", "blocks": {"2": [32, 2], "3": [32, 2]}, "width": 8, "grid": 2
    }  # fmt: skip
    assert all(parameter.device.type == "cpu" for parameter in probe.parameters())


def test_its_size_at_sd14_is_what_the_docstring_says():
    blocks = {number: (1280, 8 if number == 7 else 4) for number in range(6, 11)}
    probe = ProbeHead(blocks=blocks)
    count = sum(parameter.numel() for parameter in probe.parameters())
    assert f"{count:,} parameters" in ProbeHead.__doc__


def test_a_missing_block_and_another_width_are_refused():
    features = make_features()
    with pytest.raises(
        ValueError, match=r"ProbeHead: features must hold blocks \[3, 7\], got \[7\]"
    ):
        make_probe()(features={7: features[7]})
    with pytest.raises(ValueError, match=r"block 3 must be \(B, 16, h, w\), got \(2, 8, 4, 4\)"):
        make_probe()(features={**features, 3: torch.zeros(2, 8, 4, 4)})


@pytest.mark.parametrize("options", [{"blocks": {}}, {"blocks": BLOCKS, "width": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="blocks must name at least one and width be positive"):
        ProbeHead(**options)


@pytest.mark.parametrize(
    ("shape", "found"),
    [((1, 16, 4, 4), r"\{3: \(1, 8, 8\), 7: \(2, 8, 8\)\}"), ((2, 16, 5, 5), r"3: \(2, 10, 10\)")],
)
def test_features_of_another_batch_or_view_are_refused(shape, found):
    features = {**make_features(), 3: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"one batch and one latent size, got .*{found}"):
        make_probe()(features=features)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({6: (0, 4)}, r"map block 6 to its channels and downscale, both above 0, got \(0, 4\)"),
        ({6: (96, 4.0)}, "both above 0"),
        ({6: 96}, "both above 0, got 96"),
        ({"x": (96, 4)}, "blocks must have block numbers as keys, such as 6, got 'x'"),
        ([6], r"blocks must be a mapping by block number, got \[6\]"),
    ],
)
def test_bad_blocks_are_refused_by_name(blocks, message):
    with pytest.raises(ValueError, match=message):
        ProbeHead(blocks=blocks)
