"""A step: passes and precision change sums by rounding alone, and what is not finite stops it."""

import pytest
import torch

from pipeline.read.batch import PairBatch
from pipeline.read.reader import PairReader
from pipeline.read.source import open_layers
from pipeline.runs.config import HeadConfig
from pipeline.runs.new_head import build_head
from pipeline.train.step import HeadTrainer
from tests.support.train_runs import CPU, make

BLOCKS = (6, 7)


@pytest.fixture(scope="module")
def source(store_folder):
    return open_layers(str(store_folder))


@pytest.fixture(scope="module")
def reader(source):
    inputs = frozenset({"latent", "text", "features"})
    return PairReader(source, tasks="*train*", inputs=inputs, blocks=BLOCKS)


@pytest.fixture
def make_step(source):
    def make_(**changes):
        config = make(**{"head": HeadConfig(name="probe", blocks=BLOCKS), **changes})
        torch.manual_seed(0)
        return HeadTrainer(
            config, build_head(config.head, source.latents, source.features), device=CPU
        )

    return make_


def keep_inputs(batch, *names):
    inputs = {name: batch.inputs[name] for name in names}
    return PairBatch(inputs, batch.mask, batch.keys, batch.phrases)


def read(reader, *numbers):
    batch = reader.read(numbers, draws=[0] * len(numbers))
    return keep_inputs(batch, "features")


def list_weights(step):
    return torch.cat([value.flatten() for value in step.head.state_dict().values()])


def test_accumulation_equals_the_big_batch_whatever_the_parts(make_step, reader):
    whole, parted, idle = make_step(), make_step(), make_step()
    figures = [
        whole.train_step([read(reader, 0, 1, 2, 3, 4)], num_global=5, step=0),
        parted.train_step(
            [read(reader, 0), read(reader, 1, 2, 3), read(reader, 4)], num_global=5, step=0
        ),
        idle.train_step([read(reader, 0, 1, 2), None, read(reader, 3, 4)], num_global=5, step=0),
    ]
    for loss, norm in figures[1:]:
        assert loss == pytest.approx(figures[0][0], rel=1e-5)
        assert norm == pytest.approx(figures[0][1], rel=1e-4)
    for step in (parted, idle):
        gradients = zip(step.head.parameters(), whole.head.parameters(), strict=True)
        for ours, theirs in gradients:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-7)


def test_the_rate_and_the_average_follow_the_step(make_step, reader):
    step = make_step(warmup_steps=4, ema_decay=0.5)
    fresh = list_weights(step).clone()
    step.train_step([read(reader, 0, 1)], num_global=2, step=0)
    assert step.optimizer.param_groups[0]["lr"] == pytest.approx(0.25e-3)
    average = torch.cat([value.flatten() for value in step.average.state_dict().values()])
    torch.testing.assert_close(average, torch.lerp(fresh, list_weights(step), 0.9))
    step.train_step([read(reader, 0, 1)], num_global=2, step=100)
    moved = torch.cat([value.flatten() for value in step.average.state_dict().values()])
    torch.testing.assert_close(moved, (average + list_weights(step)) / 2)


def test_bfloat16_is_near_and_keeps_float32_weights(make_step, reader):
    exact, coarse = make_step(precision="auto"), make_step(precision="bfloat16")
    batch = read(reader, 0, 1, 2, 3)
    losses = [step.train_step([batch], num_global=4, step=0)[0] for step in (exact, coarse)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert {value.dtype for value in coarse.head.parameters()} == {torch.float32}


def test_gradient_checkpointing_changes_no_gradient(make_step, reader):
    plain, sparing = make_step(head="znet"), make_step(head="znet", gradient_checkpointing=True)
    batch = reader.read([0], draws=[0])
    batch = keep_inputs(batch, "latent", "text")
    figures = [step.train_step([batch], num_global=1, step=0) for step in (plain, sparing)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    assert sparing.head.unet.is_gradient_checkpointing


def test_what_is_not_finite_stops_before_the_weights_move(make_step, reader):
    step = make_step()
    with torch.no_grad():
        next(step.head.parameters()).fill_(float("nan"))
    before = list_weights(step).clone()
    with pytest.raises(FloatingPointError, match=r"step 8: the loss is nan, the gradient"):
        step.train_step([read(reader, 0)], num_global=1, step=7)
    assert torch.equal(list_weights(step).nan_to_num(7.0), before.nan_to_num(7.0))


def test_asking_to_stop_reaches_the_workers(make_step, reader):
    step = make_step()
    step.train_step([read(reader, 0)], num_global=1, step=0)
    assert not step.stopping
    step.train_step([read(reader, 0)], num_global=1, step=1, stop=True)
    assert step.stopping
