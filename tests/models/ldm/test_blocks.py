"""SDXL's added conditions are made where they are read (their values: test_families)."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.ldm.blocks import build_added_conditions

CONFIG = {
    "addition_embed_type": "text_time",
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
    "addition_time_embed_dim": 8,
}


class Recorder(TorchDispatchMode):
    """The names of all operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_nothing_is_copied_from_the_host():
    """Such a copy waits for the device, in each pass of the UNet."""
    with Recorder() as recorder:
        found = build_added_conditions(CONFIG, torch.ones(3, 24), torch.ones(3, 4, 8, 16))
    names = set(recorder.names) - {"ones"}
    assert names == {"zeros", "slice", "fill_"}
    assert found["time_ids"].tolist() == [[64, 128, 0, 0, 64, 128]] * 3
    assert found["time_ids"].dtype == torch.float32
