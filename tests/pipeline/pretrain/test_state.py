"""States of a pretraining stage: what comes back is what was saved, whenever a kill came."""

import json
import multiprocessing
import signal

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.base.failpoints import set_failpoints
from pipeline.pretrain.state import (
    find_last_state,
    load_average,
    load_state,
    read_record,
    save_state,
)


@pytest.fixture(autouse=True)
def _failpoints_off():
    yield
    set_failpoints("")


def make_model(fill=0.5):
    model = nn.Linear(2, 3)
    for value in model.parameters():
        nn.init.constant_(value, fill)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def take_step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).square().sum().backward()
    optimizer.step()


def save(folder, step, fill=0.5):
    model, optimizer = make_model(fill)
    take_step(model, optimizer)
    average, _ = make_model(fill)
    return save_state(
        folder, step=step, model=model, average=average, optimizer=optimizer, record={"config": {}}
    )


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    model, optimizer = make_model()
    take_step(model, optimizer)
    path = save_state(
        tmp_path, step=7, model=model, average=model, optimizer=optimizer, record={"config": {}}
    )
    again, other = make_model(0)
    load_state(path, again, other)
    for each in ((model, optimizer), (again, other)):
        take_step(*each)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    assert read_record(path)["step"] == 7


def test_the_newest_two_are_kept(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000006"]


def test_names_in_the_files_stay(tmp_path):
    """A state of before this version, by hand."""
    path = tmp_path / "step-000200"
    path.mkdir()
    tensors = {"weight": torch.full((3, 2), 0.25), "bias": torch.ones(3)}
    moments = {
        f"optimizer/{key}/{name}": torch.full_like(value, 0.125)
        for key in ("exp_avg", "exp_avg_sq")
        for name, value in tensors.items()
    }
    steps = {f"optimizer/step/{name}": torch.tensor(200.0) for name in tensors}
    weights = {f"weights/{name}": value for name, value in tensors.items()}
    save_file({**weights, **moments, **steps}, path / "training.safetensors")
    save_file(tensors, path / "average.safetensors")
    (path / "record.json").write_text(json.dumps({"config": {}, "step": 200}))
    found = find_last_state(tmp_path)
    model, optimizer = make_model()
    load_state(found, model, optimizer)
    assert torch.equal(model.weight, tensors["weight"])
    assert optimizer.state[model.bias]["step"] == 200
    assert (optimizer.state[model.weight]["exp_avg"] == 0.125).all()
    load_average(found, average := make_model()[0])
    assert torch.equal(average.bias, tensors["bias"])


def _save_and_die(folder):
    set_failpoints("checkpoint.replaced=kill")
    save(folder, 2, fill=1)


def test_a_kill_while_a_state_is_replaced_leaves_the_one_before(tmp_path):
    save(tmp_path, 2, fill=0)
    process = multiprocessing.get_context("fork").Process(target=_save_and_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    found = find_last_state(tmp_path)
    assert read_record(found)["step"] == 2
    load_average(found, average := make_model()[0])
    assert (average.weight == 0).all()
    save(tmp_path, 2, fill=1)  # the resumed run comes there again
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    load_average(tmp_path / "step-000002", average)
    assert (average.weight == 1).all()
