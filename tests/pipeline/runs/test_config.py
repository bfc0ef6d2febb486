"""A training config says at once what would do nothing or fail late."""

import pytest

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
