"""Training: the loss falls, a resumed run is the same run, two workers are one."""

import json
import multiprocessing
import os
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.heads import load_head
from pipeline.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint
from pipeline.order import shuffle_positions
from pipeline.reader import Source
from pipeline.spec import SpecError
from pipeline.store import Store, create_snapshot
from pipeline.train import METRICS, Worker, build_head, fit, open_readers, rate_factor
from pipeline.train_config import DataConfig, HeadConfig, TrainConfig
from pipeline.train_job import find_source, run_train

CONFIG = TrainConfig(
    head=HeadConfig(name="znet"),
    num_steps=6,
    batch_size=4,
    learning_rate=1e-3,
    log_every=1,
    validate_every=3,
    validation_pairs=4,
    checkpoint_every=3,
    ema_decay=0.5,
)
CPU = torch.device("cpu")


def make(config=CONFIG, **changes):
    head = changes.pop("head", None)
    if head:
        changes["head"] = HeadConfig(name=head)
    return config.model_copy(update=changes)


def fit_here(config, store_folder, out, *, rank=0, num_workers=1, resume=False):
    out.mkdir(parents=True, exist_ok=True)
    source = find_source(config, str(store_folder), resume_from=out if resume else None)
    fit(config, source, out, Worker(rank, num_workers, CPU), resume=resume)


def losses(out):
    records = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r and "verb" not in r}


@pytest.mark.parametrize("head", ["rgbnet", "znet", "ldznet"])
def test_the_loss_falls(tmp_path, store_folder, head):
    config = make(head=head, num_steps=40, batch_size=8, checkpoint_every=100, validate_every=100)
    fit_here(config.model_copy(update={"learning_rate": 3e-4}), store_folder, tmp_path)
    found = losses(tmp_path)
    assert sorted(found) == list(range(1, 41))
    values = list(found.values())
    assert np.mean(values[-8:]) < 0.8 * np.mean(values[:4])


def test_a_checkpoint_holds_the_averaged_head_and_what_it_was_trained_on(tmp_path, store_folder):
    fit_here(make(head="ldznet"), store_folder, tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003", "step-000006"]
    head, record = load_checkpoint(tmp_path)
    assert record.step == 6
    assert head.name == "ldznet"
    store = Store.open(str(store_folder))
    latents, features = store.list_layers()
    assert (record.latents, record.features) == (latents, features)
    assert set(record.validation) == {"mIoU", "IoU_FG", "AP"}
    raw = load_file(find_checkpoint(tmp_path) / "training.safetensors")
    average = load_head(find_checkpoint(tmp_path)).state_dict()
    name = "unet.conv_out.weight"
    assert not torch.equal(raw[f"weights/{name}"], average[name])


def test_a_resumed_run_is_the_undisturbed_run(tmp_path, store_folder):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit_here(CONFIG, store_folder, whole)
    fit_here(make(num_steps=3), store_folder, parts)
    fit_here(CONFIG, store_folder, parts, resume=True)
    assert losses(parts) == losses(whole)
    ours, theirs = (load_file(find_checkpoint(o) / "training.safetensors") for o in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (load_checkpoint(out)[0].state_dict() for out in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _fit_as_rank(rank, port, config, store_folder, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    fit_here(config, store_folder, out, rank=rank, num_workers=2)
    torch.distributed.destroy_process_group()


def test_two_workers_take_the_same_steps_as_one(tmp_path, store_folder):
    """The epoch's last batch is odd and small, so the shares are unequal and one may be empty."""
    num_pairs = _num_pairs(store_folder)
    batch = next(b for b in (4, 5, 3, 6) if num_pairs % b == 1 or b == 6)
    config = make(num_steps=-(-num_pairs // batch) + 1, batch_size=batch, validation_pairs=1)
    fit_here(config, store_folder, tmp_path / "one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_fit_as_rank, args=(r, port, config, store_folder, tmp_path / "two"))
        for r in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=2e-3)


def _num_pairs(store_folder):
    store = Store.open(str(store_folder))
    commits = store.newest_commits(store.list_layers()[0].folder)
    return sum(commit.rows["pairs"] for task, commit in commits.items() if "train" in task)


def test_every_pair_of_an_epoch_is_seen_once(store_folder):
    num = _num_pairs(store_folder)
    for epoch in range(3):
        order = shuffle_positions(np.arange(num), num=num, seed=0, epoch=epoch)
        assert sorted(order) == list(range(num))


def test_resuming_with_another_config_is_refused(tmp_path, store_folder):
    fit_here(make(num_steps=3), store_folder, tmp_path)
    with pytest.raises(SpecError, match="another config: learning_rate differ"):
        fit_here(make(learning_rate=1e-4), store_folder, tmp_path, resume=True)


def test_an_out_that_holds_a_run_is_not_overwritten(tmp_path, store_folder):
    fit_here(make(num_steps=3), store_folder, tmp_path)
    with pytest.raises(SpecError, match="add --resume to go on"):
        run_train(CONFIG, str(store_folder), tmp_path, num_workers=0, resume=False)
    with pytest.raises(SpecError, match="expected a checkpoint"):
        run_train(CONFIG, str(store_folder), tmp_path / "none", num_workers=0, resume=True)


def test_an_empty_split_is_said_before_training(tmp_path, store_folder):
    data = CONFIG.data.model_copy(update={"validation": "test*"})
    with pytest.raises(SpecError, match=r"tasks 'test\*': expected at least one committed pair"):
        run_train(make(data=data), str(store_folder), tmp_path / "o", num_workers=0, resume=False)
    assert not (tmp_path / "o").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, store_folder):
    with pytest.raises(FloatingPointError, match=r"the loss is .*Lower learning_rate"):
        fit_here(make(learning_rate=1e12, clip_norm=1e12), store_folder, tmp_path)


def test_heads_start_from_the_ldms_unet_or_afresh(store_folder):
    latents, features = Store.open(str(store_folder)).list_layers()
    torch.manual_seed(0)
    from_ldm = build_head(HeadConfig(name="znet"), latents, features)
    again = build_head(HeadConfig(name="znet"), latents, None)
    afresh = build_head(HeadConfig(name="znet", initialise="random"), latents, features)
    name = "unet.conv_in.weight"
    assert torch.equal(from_ldm.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(from_ldm.state_dict()[name], afresh.state_dict()[name])


def test_a_new_head_starts_at_the_masks_mean_area(tmp_path, store_folder):
    """The first loss is about that of a constant prediction of the mean area."""
    config = make(num_steps=1, batch_size=27, learning_rate=1e-9)
    fit_here(config, store_folder, tmp_path / "prior")
    head = HeadConfig(name="znet", start_at_prior=False)
    fit_here(config.model_copy(update={"head": head}), store_folder, tmp_path / "zero")
    source = find_source(config, str(store_folder), resume_from=None)
    area = open_readers(config, source)[0].index["mask_area"].to_numpy().mean()
    entropy = -(area * np.log(area) + (1 - area) * np.log(1 - area))
    assert losses(tmp_path / "prior")[1] == pytest.approx(entropy, rel=0.1)
    assert losses(tmp_path / "zero")[1] > 1.5 * entropy


def test_learning_rate_schedules():
    config = make(num_steps=10, warmup_steps=4, schedule="cosine")
    factors = [rate_factor(config, step) for step in range(10)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.5)
    assert sorted(factors[4:], reverse=True) == factors[4:]
    assert rate_factor(make(num_steps=10), 9) == 1.0


def test_source_keeps_the_snapshot_of_the_run_resumed(tmp_path, store_folder):
    fit_here(make(num_steps=3), store_folder, tmp_path)
    source = find_source(CONFIG, str(store_folder), resume_from=tmp_path)
    assert isinstance(source, Source)
    assert source.snapshot.digest == load_checkpoint(tmp_path)[1].snapshot


def test_a_probe_learns_from_features_alone(tmp_path, store_folder):
    config = make(head="probe", num_steps=60, batch_size=8, checkpoint_every=60, learning_rate=3e-3)
    fit_here(config, store_folder, tmp_path)
    values = list(losses(tmp_path).values())
    assert np.mean(values[-8:]) < 0.9 * np.mean(values[:4])
    head, record = load_checkpoint(tmp_path)
    assert head.name == "probe"
    assert record.train.head.blocks == tuple(head.feature_channels)


def test_a_pinned_snapshot_is_read_whatever_was_committed_since(copied_store):
    store = Store.open(str(copied_store))
    folders = [layer.folder for layer in store.list_layers()]
    pinned = create_snapshot(store, folders)
    for folder in folders:  # one task fewer than what is pinned
        next((copied_store / folder / "commits").glob("*train-00001*")).unlink()
    data = DataConfig(snapshot=pinned.digest)
    config = make(head="ldznet", data=data)
    assert find_source(config, str(copied_store), resume_from=None).snapshot == pinned
    fresh = find_source(make(head="ldznet"), str(copied_store), resume_from=None)
    assert len(fresh.snapshot.records[folders[0]]) == len(pinned.records[folders[0]]) - 1
    only = create_snapshot(store, folders[:1])
    config = make(head="ldznet", data=DataConfig(snapshot=only.digest))
    with pytest.raises(SpecError, match=f"{only.digest} holds {folders[0]}, without {folders[1]}"):
        find_source(config, str(copied_store), resume_from=None)
