"""Checkpoints are written beside the training, whole or not at all; damage is noticed."""

import errno
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from models.heads.probe import ProbeHead
from models.heads.registry import load_head
from pipeline.base.failpoints import CHECKPOINT_STEPS, set_failpoints
from pipeline.base.yaml import SpecError
from pipeline.runs.checkpoint import (
    BEST,
    RECORD,
    TRAINING,
    CheckpointRecord,
    DamagedCheckpointError,
    find_checkpoint,
    find_resumable,
    list_checkpoints,
    load_checkpoint,
    verify_files,
)
from pipeline.runs.checkpoint_writer import CheckpointWriter, TakenOverError, check_room
from pipeline.runs.config import HeadConfig, TrainConfig
from pipeline.runs.state import collect_training, restore_training
from pipeline.store.store import Store

FIRST_TIME = [step for step in CHECKPOINT_STEPS if step != "checkpoint.replaced"]
CONFIG = TrainConfig(head=HeadConfig(name="probe", blocks=(6,)), num_steps=9)


@pytest.fixture(autouse=True)
def _failpoints_off():
    yield
    set_failpoints("")


@pytest.fixture(scope="module")
def layers(store_folder):
    return Store.open(str(store_folder)).list_layers()


def make_head(fill=0.5):
    head = ProbeHead(blocks={6: (4, 8)}, width=2)
    for value in head.parameters():
        nn.init.constant_(value, fill)
    return head


def list_weights(head):
    return {f"weights/{name}": value for name, value in head.state_dict().items()}


def make_record(layers, step, **changes):
    latents, features = layers
    return CheckpointRecord(
        step=step, store="s", snapshot="x", train=CONFIG, latents=latents, features=features,
        **changes,
    )  # fmt: skip


def save_steps(out, layers, steps, *, best=(), num_kept=2):
    """Go on from the newest whole checkpoint; save one of each step, its weights that number."""
    first_step = find_resumable(out)[1].step if list_checkpoints(out) else 0
    with closing(CheckpointWriter(out, num_kept=num_kept, first_step=first_step)) as writer:
        for step in steps:
            head = make_head(fill=step)
            training = list_weights(head) | {"optimizer/step/a": torch.tensor(step)}
            writer.save(head, make_record(layers, step), training, best=step in best)


def steps_of(out):
    return [int(path.name[5:]) for path in list_checkpoints(out)]


def test_what_is_loaded_is_what_was_saved(tmp_path, layers):
    head, average = make_head(0.25), make_head(0.5)
    optimizer = torch.optim.AdamW(head.parameters())
    sum(value.sum() for value in head.parameters()).backward()
    optimizer.step()
    loop = {"best": 0.5, "schedule": {"bad": 2}}
    with closing(CheckpointWriter(tmp_path, num_kept=1, first_step=0)) as writer:
        record = make_record(layers, 3, loop=loop, validation={"AP": 0.5})
        writer.save(average, record, collect_training(head, optimizer), best=True)
    loaded, found = load_checkpoint(tmp_path)
    assert (found.step, found.loop, found.validation, found.best) == (3, loop, {"AP": 0.5}, True)
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in average.state_dict().items())
    again = make_head()
    other = torch.optim.AdamW(again.parameters())
    restore_training(again, other, load_file(find_checkpoint(tmp_path) / TRAINING))
    assert all(torch.equal(again.state_dict()[k], v) for k, v in head.state_dict().items())
    for ours, theirs in zip(again.parameters(), head.parameters(), strict=True):
        for key, value in optimizer.state[theirs].items():
            assert torch.equal(other.state[ours][key], value), key


def test_weights_may_change_as_soon_as_save_returns(tmp_path, layers):
    set_failpoints("checkpoint.opened=sleep:0.2")
    head = make_head(1)
    with closing(CheckpointWriter(tmp_path, num_kept=3, first_step=0)) as writer:
        for step in (1, 2):  # the second into the first's memory
            training = list_weights(head)
            writer.save(head, make_record(layers, step), training, best=False)
            assert steps_of(tmp_path) == list(range(1, step))  # not yet: a thread writes it
            for value in head.parameters():
                value.data.add_(1)
    for step, path in enumerate(list_checkpoints(tmp_path), start=1):
        values = [*load_file(path / TRAINING).values(), *load_head(path).parameters()]
        assert all((value == step).all() for value in values)


def test_the_newest_and_the_best_are_kept(tmp_path, layers):
    save_steps(tmp_path, layers, [10, 20, 30, 40, 50], best=[20, 10])
    assert steps_of(tmp_path) == [20, 40, 50]
    assert os.readlink(tmp_path / BEST) == "checkpoints/step-000020"
    assert load_checkpoint(tmp_path / BEST)[1].step == 20
    save_steps(tmp_path, layers, [60], best=[60])
    assert steps_of(tmp_path) == [50, 60]
    assert load_checkpoint(tmp_path / BEST)[1].step == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEST, "checkpoints"]


def test_a_run_that_moved_still_has_its_best(tmp_path, layers):
    save_steps(tmp_path / "here", layers, [1, 2, 3], best=[1])
    (tmp_path / "here").rename(tmp_path / "there")
    assert load_checkpoint(tmp_path / "there" / BEST)[1].step == 1


@pytest.mark.parametrize("step", FIRST_TIME)
def test_an_error_at_any_step_leaves_whole_checkpoints(tmp_path, layers, step):
    save_steps(tmp_path, layers, [1, 2])
    set_failpoints(f"{step}=raise")
    with pytest.raises(OSError, match="failpoint checkpoint"):
        save_steps(tmp_path, layers, [3], best=[3])
    set_failpoints("")
    named = step not in ("checkpoint.opened", "checkpoint.written")
    _, record = find_resumable(tmp_path)
    assert record.step == (3 if named else 2)
    save_steps(tmp_path, layers, [4])
    assert steps_of(tmp_path) == ([3, 4] if named else [2, 4])
    assert (tmp_path / BEST).exists() == named  # where the kill came before its link, mended
    assert not list((tmp_path / "checkpoints").glob(".*step-*"))


def test_a_full_disk_keeps_what_is_there_and_says_what_to_do(tmp_path, layers):
    save_steps(tmp_path, layers, [1])
    set_failpoints("checkpoint.opened=full")
    with pytest.raises(OSError, match=r"no space for the checkpoint.*Free some space") as caught:
        save_steps(tmp_path, layers, [2])
    assert caught.value.errno == errno.ENOSPC
    assert steps_of(tmp_path) == [1]
    assert not list((tmp_path / "checkpoints").glob(".*step-*"))


def test_a_disk_that_fills_while_it_is_written(tmp_path, layers):
    """A real file system of 64 KiB: what safetensors raises is said like any full disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a tmpfs here")
    try:
        save_steps(disk, layers, [1])
        with closing(CheckpointWriter(disk, num_kept=2, first_step=1)) as writer:
            large = {"weights/w": torch.zeros(10**5)}
            writer.save(make_head(), make_record(layers, 2), large, best=False)
            with pytest.raises(OSError, match="no space for the checkpoint"):
                writer.wait()
        assert find_resumable(disk)[1].step == 1
        save_steps(disk, layers, [3])
        assert steps_of(disk) == [1, 3]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _damage_cut(path):
    os.truncate(path, path.stat().st_size // 2)


def _damage_flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_damage_cut, _damage_flip, Path.unlink])
@pytest.mark.parametrize("name", [TRAINING, "model.safetensors", "config.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, layers, caplog, damage, name):
    save_steps(tmp_path, layers, [1, 2])
    damage(tmp_path / "checkpoints/step-000002" / name)
    with caplog.at_level(logging.WARNING):
        path, record = find_resumable(tmp_path)
    assert (path.name, record.step) == ("step-000001", 1)
    assert f"step-000002/{name}: expected" in caplog.text
    assert "going on from the checkpoint before it" in caplog.text
    save_steps(tmp_path, layers, [2])  # the resumed run comes there again
    verify_files(tmp_path / "checkpoints/step-000002", find_resumable(tmp_path)[1])
    assert find_resumable(tmp_path)[1].step == 2


def test_a_torn_record_is_damage_and_evaluating_it_says_so(tmp_path, layers):
    save_steps(tmp_path, layers, [1, 2])
    _damage_cut(tmp_path / "checkpoints/step-000002" / RECORD)
    assert find_resumable(tmp_path)[1].step == 1
    with pytest.raises(DamagedCheckpointError, match=r"step-000002/ldznet\.json: expected JSON"):
        load_checkpoint(tmp_path)
    _damage_flip(tmp_path / "checkpoints/step-000001/model.safetensors")
    with pytest.raises(DamagedCheckpointError, match=r"model.safetensors: expected \d+ bytes"):
        load_checkpoint(tmp_path / "checkpoints/step-000001")
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        find_resumable(tmp_path)


def test_checkpoints_of_before_have_neither_sums_nor_loop(tmp_path, layers):
    save_steps(tmp_path, layers, [1])
    path = tmp_path / "checkpoints/step-000001" / RECORD
    record = make_record(layers, 1)
    old = record.model_dump_json(exclude={"loop", "files", "best"})
    path.write_text(old)
    assert load_checkpoint(tmp_path)[1] == record
    assert find_resumable(tmp_path)[1].loop == {}


def test_an_earlier_writer_ends_when_another_has_come(tmp_path, layers):
    """As a worker that hung while Ray started another in its place, and that then goes on."""
    set_failpoints("checkpoint.written@2=sleep:0.3")
    head = make_head()
    training = list_weights(head)
    early = CheckpointWriter(tmp_path, num_kept=2, first_step=0)
    early.save(head, make_record(layers, 1), training, best=False)
    early.wait()
    early.save(head, make_record(layers, 2), training, best=False)
    late = CheckpointWriter(tmp_path, num_kept=2, first_step=1)
    with pytest.raises(TakenOverError, match="another run writes its checkpoints here"):
        early.close()
    late.save(head, make_record(layers, 2), training, best=False)
    late.close()
    assert steps_of(tmp_path) == [1, 2]
    assert find_resumable(tmp_path)[1].step == 2


def _save_and_die(out, layers, step, number=3, num_kept=2):
    set_failpoints(f"{step}=kill")
    save_steps(out, layers, [number], best=[number], num_kept=num_kept)


@pytest.mark.parametrize("step", FIRST_TIME)
def test_kill_9_at_any_step_leaves_whole_checkpoints(tmp_path, layers, step):
    save_steps(tmp_path, layers, [1, 2], best=[1])
    context = multiprocessing.get_context("fork")  # it needs no start, and dies as any process
    process = context.Process(target=_save_and_die, args=(tmp_path, layers, step))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    for path in list_checkpoints(tmp_path):
        _, record = load_checkpoint(path)
        verify_files(path, record)
        load_file(path / TRAINING)
    newest = find_resumable(tmp_path)[1].step
    assert newest == (2 if step in ("checkpoint.opened", "checkpoint.written") else 3)
    assert (tmp_path / BEST).exists()
    save_steps(tmp_path, layers, [4])
    _, best = load_checkpoint(tmp_path / BEST)
    assert (best.best, best.step) == (True, 1 if newest == 2 else 3)
    assert not list((tmp_path / "checkpoints").glob(".*step-*"))


@pytest.mark.parametrize("step", CHECKPOINT_STEPS)
def test_kill_9_while_the_only_checkpoint_is_written_again(tmp_path, layers, step):
    """As after a stop in a validation: the same step comes again, and there is no other."""
    save_steps(tmp_path, layers, [2], num_kept=1)
    process = multiprocessing.get_context("fork").Process(
        target=_save_and_die, args=(tmp_path, layers, step, 2, 1)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    path, record = find_resumable(tmp_path)
    assert record.step == 2
    assert path.name == (".old-" if step == "checkpoint.replaced" else "") + "step-000002"
    load_file(path / TRAINING)
    CheckpointWriter(tmp_path, num_kept=1, first_step=2).close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002"]
    assert find_resumable(tmp_path)[1].step == 2
    assert not list((tmp_path / "checkpoints").glob(".*step-*"))


def test_what_a_run_goes_back_behind_is_neither_its_newest_nor_its_best(tmp_path, layers):
    save_steps(tmp_path, layers, [500, 1000], best=[500, 1000])
    _damage_cut(tmp_path / "checkpoints/step-001000" / TRAINING)
    save_steps(tmp_path, layers, [])  # a start alone
    assert load_checkpoint(tmp_path / BEST)[1].step == 500
    assert (tmp_path / "checkpoints/.damaged-step-001000").is_dir()
    save_steps(tmp_path, layers, [750], num_kept=1)
    assert steps_of(tmp_path) == [500, 750]  # the best and the newest
    assert find_resumable(tmp_path)[1].step == 750
    assert not (tmp_path / "checkpoints/.damaged-step-001000").exists()


def test_a_damaged_checkpoint_does_not_become_the_best_again(tmp_path, layers):
    save_steps(tmp_path, layers, [1, 2, 3], best=[1, 2], num_kept=3)
    (tmp_path / BEST).unlink()
    _damage_flip(tmp_path / "checkpoints/step-000002" / TRAINING)
    save_steps(tmp_path, layers, [])
    assert load_checkpoint(tmp_path / BEST)[1].step == 1


def test_a_best_that_was_copied_as_a_folder_goes_aside(tmp_path, layers):
    save_steps(tmp_path, layers, [1], best=[1])
    for number in (1, 2):
        (tmp_path / BEST).unlink()
        shutil.copytree(tmp_path / "checkpoints/step-000001", tmp_path / BEST)
        save_steps(tmp_path, layers, [])
        assert load_checkpoint(tmp_path / f"best.old-{number}")[1].step == 1
        assert os.readlink(tmp_path / BEST) == "checkpoints/step-000001"


@pytest.mark.parametrize("name", ["EPERM", "EOPNOTSUPP", "ENOSYS", "EACCES", "EROFS"])
def test_without_symbolic_links_the_best_is_kept_and_found_all_the_same(
    tmp_path, layers, monkeypatch, caplog, name
):
    def refuse(*names, **options):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(os, "symlink", refuse)
    save_steps(tmp_path, layers, [1, 2, 3, 4, 5], best=[1, 2])
    assert f"{tmp_path}: its file system makes no symbolic links" in caplog.text
    assert steps_of(tmp_path) == [2, 4, 5]
    assert load_checkpoint(tmp_path / BEST)[1].step == 2
    save_steps(tmp_path, layers, [6])  # resumed
    assert (steps_of(tmp_path), load_checkpoint(tmp_path / BEST)[1].step) == ([2, 5, 6], 2)
    save_steps(tmp_path, layers, [7], best=[7])
    assert (steps_of(tmp_path), load_checkpoint(tmp_path / BEST)[1].step) == ([6, 7], 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


@pytest.mark.parametrize(("linked", "name"), [(True, "EACCES"), (False, "ENOSPC")])
def test_a_link_that_fails_where_links_are_made_is_an_error(
    tmp_path, layers, monkeypatch, linked, name
):
    """For the old one would be taken for the best."""
    save_steps(tmp_path, layers, [1], best=[1] if linked else [])

    def refuse(*names, **options):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
        save_steps(tmp_path, layers, [2], best=[2])


def test_a_run_without_a_best_checkpoint_has_none_of_that_name(tmp_path, layers):
    save_steps(tmp_path, layers, [1])
    with pytest.raises(SpecError, match="best: expected a checkpoint"):
        load_checkpoint(tmp_path / BEST)


def test_an_error_of_the_write_is_heard_before_the_next(tmp_path, layers):
    set_failpoints("checkpoint.written=full")
    writer = CheckpointWriter(tmp_path, num_kept=1, first_step=0)
    writer.check()
    writer.save(make_head(), make_record(layers, 1), {}, best=False)
    writer._pending.exception(30)
    with pytest.raises(OSError, match="no space for the checkpoint"):
        writer.check()
    writer.check()  # said once
    writer.close()


@pytest.mark.parametrize(
    ("num_bytes", "there", "every", "found"),
    [
        (1_000_000, 0, 1, ""),
        (1_200_000, 0, 1, "may be one more, but 4.2 MB"),  # 3 and the best
        (1_500_000, 0, 1, "the 3 checkpoints to come take 1.5 MB each, .* but 4.2 MB are free. F"),
        (1_500_000, 0, 5, "may be one more"),  # the run has 2
        (1_500_000, 2, 1, ""),  # which are counted already
        (5_000_000, 5, 1, "the 1 checkpoints to come"),  # it is written before others go
    ],
)
def test_room_for_the_checkpoints_is_asked_for(small_disk, caplog, num_bytes, there, every, found):
    out = small_disk(4 * 2**20)
    for step in range(there):
        (out / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    config = CONFIG.model_copy(update={"checkpoint_every": every})
    if found.startswith("the"):
        with pytest.raises(OSError, match=found):
            check_room(out, config, num_bytes=num_bytes, first_step=there)
    else:
        check_room(out, config, num_bytes=num_bytes, first_step=there)
        assert found in caplog.text
    assert bool(caplog.text) == found.startswith("may")
