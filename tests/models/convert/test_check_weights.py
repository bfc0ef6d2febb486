"""Weights before they are written: finite floats, of one dtype, those of their class."""

import pytest
import torch

from models.convert.check_weights import check_weights, unify_dtype
from models.convert.names import ConversionError


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([1.0, float("nan")]), r"^a\.b: expected finite weights.* in 1 of 2"),
        (torch.tensor([float("-inf")]), r"^a\.b: expected finite weights"),
        (torch.tensor(1.0), r"^a\.b: .* a single number"),
        (torch.zeros(2, dtype=torch.int8), r"^a\.b: .* got int8"),
        (torch.zeros(2, dtype=torch.complex64), r"^a\.b: .* got complex64"),
        (torch.zeros(2).to(torch.float8_e4m3fn), r"^a\.b: .* got float8_e4m3fn"),
        (torch.zeros(2, 2).to_sparse(), r"^a\.b: .*sparse_coo"),
    ],
)
def test_what_is_no_weight_is_named(weight, message):
    check_weights({"a": torch.ones(2)})
    with pytest.raises(ConversionError, match=message):
        check_weights({"a": torch.ones(2), "a.b": weight})


def test_one_dtype_that_holds_all():
    half, brain = torch.ones(2).half(), torch.ones(2).bfloat16()
    unified, note = unify_dtype({"a": half, "b": brain}, None)
    assert {tensor.dtype for tensor in unified.values()} == {torch.float32}
    assert note == "bfloat16 and float16 in the file, all float32 here"
    unified, note = unify_dtype({"a": half}, None)
    assert (unified["a"] is half, note) == (True, "")


def test_a_value_beyond_the_dtype_asked_for_is_named():
    with pytest.raises(ConversionError, match=r"^a: holds values to 1e\+05, beyond float16"):
        unify_dtype({"a": torch.tensor([1e5])}, torch.float16)
