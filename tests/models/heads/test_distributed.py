"""A DistributedDataParallel step of two processes is the one-process step on the joined batch."""

import os

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import distributed, multiprocessing
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from models.ldm.blocks import list_blocks
from tests.support.new_heads import build_from_unet

pytestmark = pytest.mark.thorough

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "block_out_channels": (16, 32, 32, 32),
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
NUM_PROCESSES = 2
CASES = [("ldznet", True), ("ldznet", False), ("probe", False)]  # and gradient checkpointing
BATCH = 4


def build(name):
    torch.manual_seed(0)
    return build_from_unet(name, UNet2DConditionModel(**UNET), blocks=[6, 7])


def make_batch():
    torch.manual_seed(1)
    with torch.device("meta"):
        blocks = {block.number: block for block in list_blocks(UNet2DConditionModel(**UNET))}
    return {
        "latent": torch.randn(BATCH, 4, 8, 8),
        "text": torch.randn(BATCH, 5, 24),
        "image": torch.rand(BATCH, 64, 64, 3),
        "features": {
            number: torch.randn(
                BATCH, blocks[number].channels, *[8 // blocks[number].downscale] * 2
            )
            for number in (6, 7)
        },
        "mask": (torch.rand(BATCH, 1, 64, 64) > 0.7).float(),
    }


def take_step(model, head, batch, rows):
    inputs = {
        name: {n: x[rows] for n, x in batch[name].items()}
        if name == "features"
        else batch[name][rows]
        for name in head.reads
    }
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    loss = F.binary_cross_entropy_with_logits(model(**inputs), batch["mask"][rows])
    loss.backward()
    optimizer.step()
    return {key: value.detach().clone() for key, value in head.state_dict().items()}


def run_worker(rank, port_file, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{port_file}", rank=rank, world_size=NUM_PROCESSES
    )
    weights = {case: step_with_others(rank, *case) for case in CASES}
    torch.save(weights, os.path.join(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


def step_with_others(rank, name, checkpointing):
    head = build(name)
    if checkpointing:
        head.enable_gradient_checkpointing()
    model = DistributedDataParallel(head)
    rows = slice(rank * BATCH // NUM_PROCESSES, (rank + 1) * BATCH // NUM_PROCESSES)
    weights = take_step(model, head, make_batch(), rows)
    # The group goes last and in step: a reducer that outlives it, or a peer still in a collective,
    # can wait for ever in gloo's threads.
    del model
    distributed.barrier()
    return weights


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """Of each process, (head, checkpointing) -> weights after its step; started once for all."""
    folder = tmp_path_factory.mktemp("stepped")
    multiprocessing.spawn(
        run_worker, args=(str(folder / "rendezvous"), str(folder)), nprocs=NUM_PROCESSES
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(NUM_PROCESSES)]


@pytest.mark.parametrize(("name", "checkpointing"), CASES)
def test_two_processes_step_as_one(stepped, name, checkpointing):
    first, second = (weights[name, checkpointing] for weights in stepped)
    head = build(name)
    start = {key: value.clone() for key, value in head.state_dict().items()}
    alone = take_step(head, head, make_batch(), slice(None))
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6, msg=key)
    moved = max((alone[key] - start[key]).abs().max().item() for key in alone)
    assert moved > 1e-3  # far over the tolerance, so equal weights mean equal gradients
