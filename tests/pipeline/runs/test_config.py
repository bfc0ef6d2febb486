"""A training config says at once what would do nothing or fail late."""

import subprocess
import sys
from pathlib import Path

import pytest

from models.heads.options import LDZNetOptions, ProbeOptions
from pipeline.base.yaml import SpecError, validate
from pipeline.runs.config import TrainConfig


def read(**changes):
    head = {"name": "probe", **changes.pop("head", {})}
    return validate({"head": head, "num_steps": 1, **changes}, TrainConfig, where="x.yaml")


@pytest.mark.parametrize("blocks", [[], [6, 6], [0, 6], [99]])
def test_blocks_that_no_unet_has_are_refused(blocks):
    said = r"head\.blocks: blocks must be different numbers .* such as \[6, 7\] .*, got \["
    with pytest.raises(SpecError, match=said):
        read(head={"blocks": blocks})


def test_the_order_of_blocks_is_no_difference():
    assert read(head={"blocks": [8, 6]}) == read(head={"blocks": [6, 8]})


@pytest.mark.parametrize("field", ["learning_rate", "weight_decay", "clip_norm"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite(field, value):
    with pytest.raises(SpecError, match=f"{field}: .* finite number"):
        read(**{field: value})


def test_bfloat16_is_for_gpus_unless_asked():
    assert [read().uses_bfloat16(kind) for kind in ("cpu", "cuda")] == [False, True]
    assert read(precision="bfloat16").uses_bfloat16("cpu")
    assert not read(precision="float32").uses_bfloat16("cuda")


def test_a_config_is_read_without_loading_torch():
    code = (
        "import sys\n"
        "from pipeline.runs.config import TrainConfig\n"
        "head = {'name': 'ldznet', 'blocks': [8], 'width': 4}\n"
        "config = TrainConfig.model_validate({'head': head, 'num_steps': 1})\n"
        "assert config.head.blocks == (8,)\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_options_are_those_of_the_head_and_others_are_checked_but_not_read():
    config = read(head={"width": 4, "fusion": "concatenation"})
    assert config.head.options == ProbeOptions(width=4)
    assert config.list_unread() == {"head.fusion", "head.initialise"}
    as_ldznet = config.head.model_copy(update={"name": "ldznet"})
    assert as_ldznet.options == LDZNetOptions(fusion="concatenation")
    with pytest.raises(SpecError, match=r"head\.fusion: Input should be 'attention'"):
        read(head={"fusion": "sum"})
    with pytest.raises(
        SpecError, match=r"head\.deep: no such field; there are name,.* width, grid"
    ):
        read(head={"deep": 3})
    with pytest.raises(SpecError, match=r"head\.name: must be one of .* got 'unet'"):
        read(head={"name": "unet"})


def test_a_dump_holds_the_heads_own_options_and_reads_back_equal():
    config = read(head={"name": "ldznet", "blocks": [7]})
    plain = config.model_dump(mode="json")
    assert plain["head"] == {
        "name": "ldznet", "initialise": "ldm", "model": None, "start_at_prior": True,
        "blocks": [7], "fusion": "attention",
    }  # fmt: skip
    assert TrainConfig.model_validate(plain) == config != read(head={"name": "ldznet"})
    assert config.model_dump(exclude_defaults=True)["head"] == {"name": "ldznet", "blocks": (7,)}


def test_a_models_folder_is_absolute_and_a_hub_id_stays(tmp_path, monkeypatch):
    """Ray's workers stand elsewhere."""
    (tmp_path / "models" / "ldm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("models/ldm", "~/models/ldm", "./models/ldm/"):
        assert read(head={"model": given}).head.model == str(tmp_path / "models" / "ldm")
    assert read(head={"model": "CompVis/ldm"}).head.model == "CompVis/ldm"
