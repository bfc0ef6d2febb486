"""Memory of batches is used again when nobody can see it, and int8 stays int8 on the way."""

import threading

import numpy as np
import pytest
import torch

from models.ldm.quantize import dequantize_int8, quantize_int8
from pipeline.read.batch import BatchMemory, LazyPairBatch, PairBatch, QuantizedFeature, move_inputs
from pipeline.store.row_memory import RowMemory

CPU = torch.device("cpu")


def test_memory_that_is_free_is_taken_again():
    memory = BatchMemory(pinned=False)
    first = memory.allocate((4, 3, 5), "float16")
    assert (first.shape, first.dtype) == ((4, 3, 5), torch.float16)
    place = first.data_ptr()
    del first
    again = memory.allocate((3, 4, 5), "float16")
    assert again.data_ptr() == place


@pytest.mark.parametrize(
    "keep",
    [
        lambda tensor: tensor[1:],
        lambda tensor: tensor.numpy(),
        lambda tensor: RowMemory(tensor.numpy()).row(0),
        lambda tensor: tensor.view(torch.uint8),
        lambda tensor: tensor.T.reshape(5, 4)[0],
        lambda tensor: tensor.unbind()[-1],
    ],
)
def test_memory_that_anything_sees_is_not(keep):
    memory = BatchMemory(pinned=False)
    tensor = memory.allocate((4, 5), "int16")
    tensor.zero_()
    kept = keep(tensor)
    del tensor
    for _ in range(3):
        memory.allocate((4, 5), "int16").fill_(7)
    others = [memory.allocate((4, 5), "int16").fill_(7) for _ in range(3)]
    assert not np.asarray(kept).any()
    assert len({other.data_ptr() for other in others}) == 3


def test_memory_kept_is_bounded_and_fits():
    memory = BatchMemory(pinned=False, max_bytes=1000)
    small = memory.allocate((10,), "uint8").data_ptr()
    assert memory.allocate((100,), "uint8").data_ptr() != small
    assert memory.allocate((9,), "uint8").data_ptr() == small
    held = [memory.allocate((400,), "uint8").fill_(number) for number in range(5)]
    assert sum(array.nbytes for array in memory._arrays) <= 1000
    assert [int(tensor.sum()) // 400 for tensor in held] == [0, 1, 2, 3, 4]
    assert memory.allocate((0, 3), "float32").shape == (0, 3)


def test_threads_never_get_the_same_memory():
    memory = BatchMemory(pinned=False)
    wrong = []

    def use(number):
        for _ in range(300):
            tensor = memory.allocate((64,), "uint8").fill_(number)
            if int(tensor.sum()) != 64 * number:
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_features_become_float32_on_the_device_alone():
    values = torch.randn(2, 3, 4, 4)
    feature = QuantizedFeature(*quantize_int8(values))
    inputs = {"latent": values, "image": values.byte(), "features": {6: feature, 7: values.half()}}
    moved = move_inputs(inputs, CPU)
    assert torch.equal(moved["features"][6], dequantize_int8(feature.values, feature.scale))
    assert torch.equal(moved["features"][7], values.half().float())
    assert moved["image"].dtype == torch.uint8
    assert moved["latent"] is values
    meta = feature.to(torch.device("meta"))
    assert (meta.values.dtype, meta.values.device.type) == (torch.int8, "meta")
    assert feature.shape == values.shape


def make_inputs():
    feature = QuantizedFeature(*quantize_int8(torch.randn(2, 3, 4, 4)))
    return {
        "latent": torch.randn(2, 4, 8, 8),
        "features": {6: feature, 7: torch.randn(2, 3).half()},
    }


@pytest.mark.parametrize("ignore", [None, torch.ones(2, 8, 8, dtype=torch.uint8)])
def test_a_batch_moves_whole_and_its_texts_stay_unread(ignore):
    """``to`` is what Lightning and Accelerate look for, by position and with ``non_blocking``."""
    asked = []

    def read_texts():
        asked.append(1)
        return ("a", "b"), ("cat", "dog")

    mask = torch.zeros(2, 8, 8, dtype=torch.uint8)
    batch = LazyPairBatch(make_inputs(), mask, read_texts, ignore)
    moved = batch.to("meta", non_blocking=True)
    tensors = [moved.inputs["latent"], moved.inputs["features"][6].values, moved.truth]
    tensors += [moved.inputs["features"][6].scale, moved.inputs["features"][7]]
    tensors += [] if ignore is None else [moved.ignore]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.ignore is None) == (ignore is None)
    assert moved.inputs["features"][7].dtype == torch.float16
    assert batch.truth is mask
    assert batch.inputs["latent"].device.type == "cpu"
    assert not asked
    assert (moved.keys, moved.phrases) == (("a", "b"), ("cat", "dog"))
    plain = PairBatch(make_inputs(), None, keys=("a", "b"), phrases=("", "")).to(CPU)
    assert (plain.mask, plain.keys, plain.ignore) == (None, ("a", "b"), None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pins memory for a GPU")
def test_a_batch_is_pinned_whole():
    batch = PairBatch(make_inputs(), torch.zeros(2, 8, 8), keys=(), phrases=()).pin_memory()
    feature = batch.inputs["features"][6]
    assert batch.truth.is_pinned()
    assert feature.values.is_pinned()
    assert feature.scale.is_pinned()
