"""Batches on a device: results, NaN counts, and a batch that halves when memory is short."""

import pytest
import torch

from pipeline.spec.fields import FeaturesSpec
from pipeline.stage.device import BatchLimit, Device
from pipeline.stage.stored_form import store_blocks, store_float16

CPU = Device(torch.device("cpu"))


def run(limit, values, *, most, error=torch.OutOfMemoryError):
    """Twice the values, in passes of the limit, on a device where more than ``most`` do not fit."""
    passes = []

    def compute(rows):
        passes.append(rows.stop - rows.start)
        if passes[-1] > most:
            raise error("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")
        return store_float16("x", values[rows] * 2)

    found = [pending.wait()["x"] for pending in limit.run(CPU, len(values), compute)]
    return passes, torch.cat([torch.from_numpy(part) for part in found])


def test_out_of_memory_halves_the_batch_once_and_for_good():
    limit, values = BatchLimit(16, what="UNet"), torch.arange(20.0)
    passes, doubled = run(limit, values, most=5)
    assert passes == [16, 16, 8, 8, 4, 4, 4, 4, 4]  # each size is tried again once all is freed
    assert torch.equal(doubled, values.half() * 2)
    assert limit.num_rows == 4
    passes, doubled = run(limit, values[:10], most=5)
    assert passes == [4, 4, 2]  # nothing is tried that failed before
    assert torch.equal(doubled, values[:10].half() * 2)


def test_a_shortage_that_passes_halves_nothing():
    limit, passes = BatchLimit(8, what="UNet"), []

    def compute(rows):
        passes.append(rows.stop - rows.start)
        if len(passes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return store_float16("x", torch.zeros(passes[-1]))

    assert len(list(limit.run(CPU, 8, compute))) == 1
    assert (passes, limit.num_rows) == ([8, 8], 8)


def test_other_libraries_words_for_it_count_too():
    def error(text):
        return RuntimeError(f"cuDNN error: CUDNN_STATUS_ALLOC_FAILED {text}")

    limit = BatchLimit(4, what="VAE")
    run(limit, torch.zeros(4), most=2, error=error)
    assert limit.num_rows == 2


def test_one_row_that_does_not_fit_is_an_error_that_says_what_to_do():
    limit = BatchLimit(2, what="VAE")
    expected = r"VAE: one row does not fit into the memory of cpu: CUDA out of.* GiB; use a larger"
    with pytest.raises(MemoryError, match=expected):
        run(limit, torch.zeros(2), most=0)


def test_other_errors_are_raised_as_they_are():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(
            BatchLimit(2, what="VAE"), torch.zeros(2), most=0,
            error=lambda text: RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        )  # fmt: skip


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_values_that_are_not_finite_are_counted_and_refused(storage):
    spec = FeaturesSpec(blocks=(6,), timesteps=(300,), storage=storage)
    feature = torch.ones(2, 3, 4, 4)
    feature[0, 0, 0, :2] = torch.tensor([float("nan"), float("-inf")])
    pending = CPU.run(lambda: store_blocks({6: feature}, spec))
    with pytest.raises(FloatingPointError, match=r"block06: expected finite .* got 2 NaN or inf"):
        pending.wait()


def test_float16s_range_is_what_counts():
    with pytest.raises(FloatingPointError, match="got 1 NaN or infinite of 2"):
        CPU.run(lambda: store_float16("x", torch.tensor([65504.0, 65520.0]))).wait()


def test_blocks_come_back_contiguous_under_their_arrays_names():
    spec = FeaturesSpec(blocks=(6, 7), timesteps=(300,), storage="int8")
    feature = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    pending = CPU.run(lambda: store_blocks({6: feature, 7: feature}, spec))
    arrays = pending.wait()
    assert sorted(arrays) == ["block06", "block06_scale", "block07", "block07_scale"]
    assert all(array.flags.c_contiguous for array in arrays.values())
    assert pending.num_bytes == sum(array.nbytes for array in arrays.values())
    assert pending.busy_s > 0
