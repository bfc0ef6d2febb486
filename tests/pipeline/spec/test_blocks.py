"""The rows of ``ldznet blocks``: the paper's table, bytes by arithmetic, no weights read."""

import itertools
import json
import shutil

import pytest

from jobs.blocks import format_block_rows
from models.ldm.family import read_configs
from models.ldm.files import ModelFilesError
from models.ldm.sd14 import SD14_UNET
from pipeline.spec.blocks import build_empty_unet, list_block_rows, read_unet_config


def test_sd14_at_384_px_is_the_papers_table():
    rows = list_block_rows(SD14_UNET, size_px=384)
    assert [row.block for row in rows] == list(range(1, 17))
    assert (rows[6].module, rows[6].channels, rows[6].side) == ("mid_block.attentions.0", 1280, 6)
    # Blocks 6-10, one draw, 1.57 MB a pair in float16; all 16, 13 MB
    assert sum(row.draw_bytes for row in rows[5:10]) == 2 * 1280 * (4 * 144 + 36)
    assert sum(row.draw_bytes for row in rows) == pytest.approx(13e6, rel=0.02)
    shares = [row.share for row in rows]
    assert all(a < b for a, b in itertools.pairwise(shares))
    assert shares[9] <= 0.56
    assert shares[-1] < 1


def test_a_folders_config_is_enough(ldm_folder, tmp_path):
    (tmp_path / "unet").mkdir()
    shutil.copy(ldm_folder / "unet" / "config.json", tmp_path / "unet")
    rows = list_block_rows(read_unet_config(str(tmp_path)), size_px=128)
    assert [row.side for row in rows[:7]] == [16, 16, 8, 8, 4, 4, 2]
    assert "full forward pass: 0.3" in format_block_rows(rows)


def test_a_folder_without_a_unet_is_named(tmp_path):
    with pytest.raises(ModelFilesError, match=r"unet/config\.json: cannot be read as the UNet's"):
        read_unet_config(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"class_embed_type": "projection"},  # unCLIP
        {"num_class_embeds": 1000},  # the x4 upscaler
        {"_class_name": "UNet3DConditionModel"},
        {"cross_attention_dim": [64, 64, 32, 64]},
        {"in_channels": 9},  # inpainting, told by the VAE beside it
    ],
)
def test_what_encoding_refuses_is_refused_in_the_same_words(ldm_folder, tmp_path, change):
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        config = json.loads((ldm_folder / part / "config.json").read_text())
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    read_unet_config(str(tmp_path))
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelFilesError, match="unet: ") as ours:
        read_unet_config(str(tmp_path))
    with pytest.raises(ModelFilesError, match="unet: ") as encodings:
        read_configs(tmp_path)
    assert str(ours.value) == str(encodings.value)


def test_a_config_that_is_no_unet_is_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("[1]")
    with pytest.raises(ModelFilesError, match=r"config\.json: .*expected an object, got list"):
        read_unet_config(str(tmp_path))
    with pytest.raises(ModelFilesError, match=r"describes no UNet that diffusers builds: .*Odd"):
        build_empty_unet(SD14_UNET | {"down_block_types": ["OddBlock"] * 4})
