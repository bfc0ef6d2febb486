"""Where a run goes on: rank 0 looks, and the others wait until they see the same."""

import multiprocessing
import time

import pytest
import torch

from pipeline.base.yaml import SpecError
from pipeline.runs import resume as resume_point
from pipeline.runs.checkpoint import (
    MODEL,
    CheckpointRecord,
    list_checkpoints,
    sum_file,
    write_record,
)
from pipeline.runs.resume import find_resume_point
from pipeline.runs.step_folders import name_step, parse_step
from pipeline.store.store import Store
from tests.support.train_runs import CONFIG, CPU

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def out(tmp_path, store_folder):
    """A run with checkpoints of two steps."""
    latents, features = Store.open(str(store_folder)).list_layers()
    for step in (3, 6):
        folder = tmp_path / "out/checkpoints" / name_step(step)
        folder.mkdir(parents=True)
        (folder / MODEL).write_bytes(bytes([step]))
        record = CheckpointRecord(
            step=step,
            store="s",
            snapshot="x",
            train=CONFIG,
            latents=latents,
            features=features,
            files={MODEL: sum_file(folder / MODEL)},
        )
        write_record(folder, record)
    return tmp_path / "out"


def _find(rank, out, resume, blind_s, results):
    """As rank 1 whose file server shows step 6 only after a while."""
    seen_s = time.monotonic() + blind_s

    def list_late(out):
        found = list_checkpoints(out)
        return found if time.monotonic() > seen_s else [p for p in found if parse_step(p) < 6]

    resume_point.SEE_S = 10.0 if blind_s < 10 else 0.5
    if rank:
        resume_point.list_checkpoints = list_late
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2
    )
    try:
        found = find_resume_point(out, resume=resume, rank=rank, num_workers=2, device=CPU)
        results.put((rank, (found[0].name, found[1].step) if found else None))
    except RuntimeError as error:
        results.put((rank, str(error)))
    torch.distributed.destroy_process_group()


def find_in_both(out, *, resume=(True, True), blind_s=0.0):
    results = FORK.Queue()
    ranks = [
        FORK.Process(target=_find, args=(rank, out, resume[rank], blind_s, results))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(60)
    return found


def test_a_rank_that_sees_the_newest_late_waits_for_it(out):
    assert find_in_both(out, blind_s=1.0) == {0: ("step-000006", 6), 1: ("step-000006", 6)}


def test_a_rank_that_never_sees_it_says_so(out):
    found = find_in_both(out, blind_s=100.0)
    assert found[0] == ("step-000006", 6)
    assert "rank 0 goes on from step 6, but no whole checkpoint of it appeared" in found[1]


def test_all_go_on_behind_a_damaged_one(out):
    (out / "checkpoints/step-000006" / MODEL).write_bytes(b"x")
    assert find_in_both(out) == {0: ("step-000003", 3), 1: ("step-000003", 3)}


@pytest.mark.parametrize("first", [True, False])
def test_rank_0_says_whether_to_go_on(out, first):
    found = find_in_both(out, resume=(first, not first))
    assert found[0] == found[1]
    assert (found[0] is not None) == first


def test_a_rank_does_not_take_half_a_checkpoint(out, monkeypatch):
    monkeypatch.setattr(resume_point, "SEE_S", 0.0)
    path = out / "checkpoints/step-000006"
    whole = (path / MODEL).read_bytes()
    for damage in (lambda: (path / MODEL).write_bytes(b""), (path / MODEL).unlink):
        damage()
        with pytest.raises(RuntimeError, match="no whole checkpoint of it appeared"):
            resume_point._wait_for_step(out, 6)
    (path / MODEL).write_bytes(whole)
    assert resume_point._wait_for_step(out, 6)[0] == path


def test_one_worker_asks_nobody(out):
    alone = {"rank": 0, "num_workers": 1, "device": CPU}
    assert find_resume_point(out, resume=True, **alone)[1].step == 6
    assert find_resume_point(out, resume=False, **alone) is None
    with pytest.raises(SpecError, match="got neither"):
        find_resume_point(out / "other", resume=True, **alone)
