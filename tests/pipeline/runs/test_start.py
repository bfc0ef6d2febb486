"""Heads that start from a checkpoint: found and checked early, and then exactly its weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.heads.registry import load_head
from pipeline.base.yaml import SpecError, parse_yaml
from pipeline.read.source import open_layers
from pipeline.runs.checkpoint import RECORD, TRAINING, DamagedCheckpointError, find_checkpoint
from pipeline.runs.checkpoint import read_record as read_checkpoint
from pipeline.runs.config import HeadConfig, TrainConfig
from pipeline.runs.new_head import build_head
from pipeline.runs.resume import check_resumable
from pipeline.runs.start import find_start, look_up_starts
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.trials import plan_sweep
from pipeline.train.data import TrainData, open_readers
from pipeline.train.step import HeadTrainer
from tests.support.train_runs import CPU, fit_here, make

PROBE = HeadConfig(name="probe", blocks=(6, 8), width=4)
ONE = {"num_steps": 1, "ema_decay": 0.0}


@pytest.fixture(scope="module")
def trained(store_folder, tmp_path_factory):
    """The ``--out`` of a probe's run."""
    out = tmp_path_factory.mktemp("runs") / "probe"
    fit_here(make(head=PROBE, num_steps=2), store_folder, out)
    return out


def read(text, *, kind=TrainConfig, resumed=None):
    def look_up(plain):
        look_up_starts(plain, resumed=resumed)

    return parse_yaml(text, kind, where="config.yaml", prepare=look_up)


def start_at(folder):
    return HeadConfig.model_validate({"from": find_start(str(folder)).model_dump()})


def convert(checkpoint, folder):
    """The checkpoint as ``ldznet convert`` leaves one: no training, and no list of files."""
    shutil.copytree(checkpoint, folder)
    plain = json.loads((folder / RECORD).read_text())
    plain |= dict.fromkeys(("store", "snapshot", "train")) | {"files": {}}
    plain["converted"] = {"file": "published.ckpt", "sha256": "00"}
    (folder / RECORD).write_text(json.dumps(plain))
    return folder


@pytest.mark.parametrize("below", ["", "best", "checkpoints/step-000002"])
def test_a_run_its_best_and_a_step_are_found_from_any_folder(trained, monkeypatch, below):
    monkeypatch.chdir(trained.parent)
    config = read(f"head: {{from: probe/{below}}}\nnum_steps: 1")
    assert config.head.from_.checkpoint == str(trained / "checkpoints" / "step-000002")
    assert (config.head.name, config.head.options) == ("probe", PROBE.options)
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


def test_one_step_is_that_of_the_loaded_head(store_folder, trained, tmp_path):
    config = make(head=start_at(trained), **ONE)
    fit_here(config, store_folder, tmp_path)
    source = open_layers(str(store_folder))
    trainer = HeadTrainer(config, load_head(find_checkpoint(trained)), device=CPU)
    data = TrainData(config, source, open_readers(config, source)[0])
    (step,) = data.read_steps(0, 1)
    trainer.train_step(step.passes, num_global=step.num_global, step=0)
    weights = load_file(find_checkpoint(tmp_path) / TRAINING)
    for name, value in trainer.head.state_dict().items():
        assert torch.equal(weights[f"weights/{name}"], value), name
    record = read_checkpoint(find_checkpoint(tmp_path))
    assert record.train.head.from_.sha256 == find_start(str(trained)).sha256


def test_a_converted_head_is_a_start(store_folder, tmp_path):
    fit_here(make(head="ldznet", **ONE), store_folder, tmp_path / "run")
    path = convert(find_checkpoint(tmp_path / "run"), tmp_path / "converted")
    half = {name: value.half() for name, value in load_file(path / "model.safetensors").items()}
    save_file(half, path / "model.safetensors")
    config = start_at(path)
    assert config.blocks == (6, 7, 8, 9, 10)
    source = open_layers(str(store_folder))
    head = build_head(config, source.latents, source.features)
    for name, value in head.state_dict().items():
        assert torch.equal(value, half[name].float())
    (path / "model.safetensors").unlink()
    with pytest.raises(SpecError, match=r"head.from: .*expected the weights, got no file"):
        find_start(str(path))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("name: znet", "name probe, got znet; leave name out, or from$"),
        ("blocks: [8, 7]", r"has blocks \(6, 8\), got \(7, 8\); leave"),
        ("initialise: random", "initialise ldm, got random"),
    ],
)
def test_what_is_not_the_checkpoints_is_refused_with_both(trained, head, message):
    with pytest.raises(SpecError, match=message):
        read(f"head: {{from: {trained}, {head}}}\nnum_steps: 1")


def test_what_is_the_checkpoints_may_be_said_again(trained):
    again = "name: probe, blocks: [8, 6], width: 4, grid: null, initialise: ldm, fusion: attention"
    assert read(f"head: {{from: {trained}, {again}}}\nnum_steps: 1").head.options == PROBE.options


def test_a_folder_that_is_no_start_is_refused_when_the_config_is_read(trained, tmp_path):
    for folder in (tmp_path, tmp_path / "none", trained / "checkpoints"):
        with pytest.raises(SpecError, match=r"head.from: .*expected a checkpoint .* got neither"):
            read(f"head: {{from: {folder}}}\nnum_steps: 1")
    copy = shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    with (copy / "best" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(SpecError, match=r"head.from: .*the checkpoint is damaged"):
        read(f"head: {{from: {copy}}}\nnum_steps: 1")


def test_weights_that_changed_since_the_config_was_read_are_refused(
    store_folder, trained, tmp_path
):
    copy = shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    config, source = start_at(copy), open_layers(str(store_folder))
    shutil.rmtree(copy)
    with pytest.raises(SpecError, match="as when the config was read, got no file"):
        build_head(config, source.latents, source.features)


def test_a_resumed_run_does_without_its_start(store_folder, trained, tmp_path):
    start = shutil.copytree(trained, tmp_path / "start", symlinks=True)
    text = f"head: {{from: {start}}}\nnum_steps: "
    fit_here(make(head=start_at(start), **ONE), store_folder, tmp_path / "run")
    shutil.rmtree(start)
    with pytest.raises(SpecError, match="expected a checkpoint"):
        read(text + "2")
    record = read_checkpoint(find_checkpoint(tmp_path / "run"))
    assert read(text + "2", resumed=tmp_path / "run").head == record.train.head
    fit_here(make(head=PROBE, seed=1, **ONE), store_folder, tmp_path / "other")
    check_resumable(make(head=start_at(tmp_path / "other"), **ONE), record)  # is not compared
    afresh = read_checkpoint(find_checkpoint(trained))
    with pytest.raises(SpecError, match=r"head.from.checkpoint was null, is /"):
        check_resumable(make(head=start_at(trained), num_steps=2), afresh)


def test_a_trial_is_named_by_the_weights_it_starts_from(store_folder, trained, tmp_path):
    def ids(folder):
        text = f"base: {{head: {{from: {folder}}}, num_steps: 1, validation_pairs: 4}}\n"
        text += "variants: [{name: tuned}, {name: znet, head: {from: null, name: znet}}]\n"
        plan = plan_sweep(
            read(text + "axes: {seeds: [0, 1]}", kind=SweepConfig), str(store_folder), tmp_path
        )
        return [trial.id for trial in plan.trials]

    moved = shutil.copytree(trained, tmp_path / "moved", symlinks=True)
    text = f"base: {{head: {{from: {trained}}}, num_steps: 1, validation_pairs: 4}}\n"
    text += f"variants: [{{name: a}}, {{name: b, head: {{from: {moved}}}}}]\n"
    with pytest.raises(SpecError, match="variants: a and b are one trial"):
        plan_sweep(read(text, kind=SweepConfig), str(store_folder), tmp_path)
    assert ids(moved) == ids(trained)
    fit_here(make(head=PROBE, seed=1, **ONE), store_folder, tmp_path / "other")
    pairs = zip(ids(tmp_path / "other"), ids(trained), strict=True)
    assert [ours == theirs for ours, theirs in pairs] == [False, False, True, True, True]


def test_another_models_layers_are_told_or_refused(store_folder, ldm_folder, tmp_path, caplog):
    fit_here(make(head="znet", **ONE), store_folder, tmp_path / "run")
    config, latents = start_at(tmp_path / "run"), open_layers(str(store_folder)).latents
    build_head(config, latents, None)
    assert not caplog.records
    folder = shutil.copytree(ldm_folder, tmp_path / "wider")
    weights = latents.canonical["weights"] | {"vae/config.json": "another"}
    other = latents.model_copy(
        update={
            "canonical": latents.canonical | {"weights": weights},
            "source": latents.source | {"model": str(folder)},
        }
    )
    build_head(config, other, None)
    assert "another model's inputs than those it was trained on: latents-" in caplog.text
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 24}))
    with pytest.raises(SpecError, match=r"does not fit the store's layers: unet\..* is .*wider"):
        build_head(config, other, None)


def test_a_damaged_checkpoint_of_the_resumed_run_is_passed_over(store_folder, trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    (out / "checkpoints" / "step-000002" / RECORD).write_text("{")
    with pytest.raises(DamagedCheckpointError):
        read_checkpoint(out / "best")
    assert read(f"head: {{from: {trained}}}\nnum_steps: 2", resumed=out).head.name == "probe"
