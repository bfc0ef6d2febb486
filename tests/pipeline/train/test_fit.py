"""The loop: the loss falls, and a run that was cut anywhere and resumed is the undisturbed run."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.heads.registry import load_head
from pipeline.base.yaml import SpecError
from pipeline.evaluate.scoring import FIGURE_NAMES
from pipeline.read.choice import PairChoice
from pipeline.read.source import open_layers
from pipeline.runs.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_record,
    write_record,
)
from pipeline.runs.config import HeadConfig
from pipeline.runs.state import count_checkpoint_bytes
from pipeline.train.data import open_readers
from tests.support.train_runs import fit_here, losses, make, read_pairs, read_records

PROBE = make(
    head="probe",
    num_steps=12,
    schedule="plateau",
    log_every=3,
    validate_every=2,
    checkpoint_every=4,
    trace_pairs=True,
)


def read_training(out):
    path = find_checkpoint(out)
    return load_file(path / "training.safetensors"), load_head(path).state_dict()


def read_curve(out):
    """The records without what a clock measured."""
    kept = ("step", "loss", "learning_rate", "grad_norm", "validation")
    return [{name: r[name] for name in kept if name in r} for r in read_records(out)]


def check_same(ours, theirs):
    assert read_curve(ours) == read_curve(theirs)
    assert read_pairs(ours) == read_pairs(theirs)
    for left, right in zip(read_training(ours), read_training(theirs), strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    records = [read_record(find_checkpoint(out)) for out in (ours, theirs)]
    assert records[0].loop == records[1].loop
    assert (ours / "best").readlink() == (theirs / "best").readlink()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, store_folder):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert fit_here(PROBE, store_folder, out) == PROBE.num_steps
    return out


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("steps", [(7,), (5, 10)])
def test_a_run_killed_at_any_step_and_resumed_is_the_undisturbed_run(
    tmp_path, store_folder, whole, steps
):
    """Records past the checkpoint go and come again; the sums of a record go on in its middle."""
    calls = 0

    def die():
        nonlocal calls
        calls += 1
        if calls in steps:
            raise _Killed
        return False

    resume = False
    for _ in steps:
        with pytest.raises(_Killed):
            fit_here(PROBE, store_folder, tmp_path, resume=resume, should_stop=die)
        resume = bool(list_checkpoints(tmp_path))
    assert resume
    fit_here(PROBE, store_folder, tmp_path, resume=True)
    check_same(tmp_path, whole)


@pytest.mark.parametrize("asked", [1, 3, 5, 12])
def test_a_run_asked_to_end_saves_at_once_and_goes_on_as_if_undisturbed(
    tmp_path, store_folder, whole, asked
):
    """Asked at a step or inside a validation, which then is made when the run goes on."""
    calls = 0

    def ask():
        nonlocal calls
        calls += 1
        return calls >= asked

    done = fit_here(PROBE, store_folder, tmp_path, resume=False, should_stop=ask)
    assert read_record(find_checkpoint(tmp_path)).step == done
    fit_here(PROBE, store_folder, tmp_path, resume=True)
    check_same(tmp_path, whole)


def test_best_links_to_the_checkpoint_of_the_best_validation(whole):
    scores = {
        record["step"]: record["validation"]["IoU_FG"]
        for record in read_records(whole)
        if "validation" in record
    }
    best = max(scores, key=lambda step: (scores[step], -step))
    record = read_record(whole / "best")
    assert (record.step, record.validation["IoU_FG"]) == (best, scores[best])
    assert record.loop["best"] == scores[best]


def test_a_logged_loss_is_the_mean_over_its_steps(tmp_path, store_folder, whole):
    every = PROBE.model_copy(update={"log_every": 1})
    fit_here(every, store_folder, tmp_path)
    each = losses(tmp_path)
    for step, loss in losses(whole).items():
        assert loss == pytest.approx(np.mean([each[s] for s in range(step - 2, step + 1)]))


@pytest.mark.parametrize(
    "head", [*(pytest.param(x, marks=pytest.mark.thorough) for x in ("rgbnet", "znet")), "ldznet"]
)
def test_the_loss_falls(tmp_path, store_folder, head):
    """On few pairs, all of them in every batch."""
    data = {"train_filter": PairChoice(keys_to=0.2)}
    config = make(head=head, data=data, num_steps=10, validate_every=100, learning_rate=1e-3)
    num = len(open_readers(config, open_layers(str(store_folder)))[0])
    assert 2 <= num <= 8
    fit_here(config.model_copy(update={"batch_size": num}), store_folder, tmp_path)
    found = losses(tmp_path)
    assert sorted(found) == list(range(1, 11))
    assert found[10] < 0.9 * found[1]


def test_a_checkpoint_holds_the_averaged_head_and_what_it_was_trained_on(whole, store_folder):
    head, record = load_checkpoint(whole)
    assert record.step == PROBE.num_steps
    assert head.name == "probe"
    source = open_layers(str(store_folder))
    assert (record.latents, record.features) == (source.latents, source.features)
    assert record.snapshot == source.snapshot.digest
    assert record.train == PROBE
    assert set(record.validation) == set(FIGURE_NAMES)
    raw, average = read_training(whole)
    assert any(not torch.equal(raw[f"weights/{name}"], average[name]) for name in average)


def test_resuming_with_another_config_is_refused(store_folder, whole):
    with pytest.raises(
        SpecError, match=r"another config: batch_size was 4, is 5\. .* may change: l"
    ):
        fit_here(make(PROBE, batch_size=5), store_folder, whole, resume=True)


@pytest.fixture
def begun(tmp_path, store_folder):
    """A function: what the loop keeps, altered -> a run's folder, 4 steps in."""

    def begin(**loop):
        fit_here(make(PROBE, schedule="constant", num_steps=4), store_folder, tmp_path)
        path = find_checkpoint(tmp_path)
        record = read_record(path)
        write_record(path, record.model_copy(update={"loop": record.loop | loop}))
        return tmp_path

    return begin


@pytest.mark.parametrize("num", [3, 4, 100])
def test_a_best_score_of_other_validation_pairs_is_forgotten(begun, store_folder, caplog, num):
    """4 were validated. What counts is the pairs, not the number that is asked for."""
    out = begun(best=2.0)  # above any score
    config = make(PROBE, schedule="constant", num_steps=6, validation_pairs=num)
    fit_here(config, store_folder, out, resume=True)
    said = "the best score, 2, is forgotten" in caplog.text
    best = read_record(find_checkpoint(out)).loop["best"]
    assert (said, best < 1) == ((False, False) if num == 4 else (True, True))


@pytest.mark.parametrize(
    "changes", [{"best_by": "mIoU"}, {"data": {"validation_filter": PairChoice(keys_to=0.9)}}]
)
def test_a_best_score_of_something_else_is_forgotten_by_the_schedule_too(
    begun, store_folder, changes
):
    out = begun(best=2.0, rate={"factor": 0.5, "best": 2.0, "num_worse": 1})
    config = make(PROBE, schedule="plateau", num_steps=6, **changes)
    fit_here(config, store_folder, out, resume=True)
    loop = read_record(find_checkpoint(out)).loop
    assert (loop["best"] < 1, loop["rate"]["best"] < 1, loop["rate"]["factor"]) == (True, True, 0.5)


def test_a_rate_and_a_warm_up_that_change_are_logged_and_kept_and_go_on(
    begun, store_folder, caplog
):
    out = begun()
    changes = {"schedule": "constant", "learning_rate": 4e-4, "warmup_steps": 4, "log_every": 1}
    fit_here(make(PROBE, num_steps=6, **changes), store_folder, out, resume=True)
    said = "from step 4 on num_steps was 4, is 6; learning_rate was 0.001, is 0.0004; warmup_steps "
    assert (
        f"{said}was 0, is 4; log_every was 3, is 1; the next step's rate is 0.0001; the warm-up "
        "ends at step 8, after num_steps" in caplog.text
    )
    caplog.clear()
    fit_here(make(PROBE, num_steps=9, **changes), store_folder, out, resume=True)
    assert "from step 6 on num_steps was 6, is 9; the next" in caplog.text
    assert "warm-up" not in caplog.text
    caplog.clear()
    assert fit_here(make(PROBE, num_steps=9, **changes), store_folder, out, resume=True) == 9
    assert "--resume" not in caplog.text
    rates = {r["step"]: r["learning_rate"] for r in read_records(out) if "loss" in r}
    assert [rates[step] for step in range(5, 10)] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4])
    kept = read_record(find_checkpoint(out)).loop["changes"]
    assert [(change["step"], change["field"]) for change in kept] == [
        *((4, name) for name in ("num_steps", "learning_rate", "warmup_steps", "log_every")),
        (6, "num_steps"),
    ]
    assert (kept[1]["was"], kept[1]["is"]) == (1e-3, 4e-4)


def test_a_checkpoint_between_validations_has_the_last_ones_figures(tmp_path, store_folder):
    """So that its threshold is known; also where the run was resumed in between."""
    changes = {"validate_every": 3, "checkpoint_every": 1, "keep_checkpoints": 9}
    config = make(PROBE, schedule="constant", num_steps=6, **changes)
    fit_here(config, store_folder, tmp_path)
    for path in list_checkpoints(tmp_path)[4:]:
        shutil.rmtree(path)
    (tmp_path / "best").unlink()
    fit_here(config, store_folder, tmp_path, resume=True)
    figures = {r["step"]: r["validation"] for r in read_records(tmp_path) if "validation" in r}
    records = [read_record(path) for path in list_checkpoints(tmp_path)]
    validated = [{}, {}, *[figures[3]] * 3, figures[6]]
    assert [record.validation for record in records] == validated
    assert [record.threshold for record in records] == [x.get("mIoU_threshold") for x in validated]


@pytest.mark.parametrize(("best_by", "forgotten"), [("AP", True), ("mIoU", False)])
def test_a_best_ap_of_before_is_forgotten(tmp_path, store_folder, caplog, best_by, forgotten):
    """It was CLIPSeg's; the schedule compares with it too."""
    config = make(PROBE, schedule="plateau", best_by=best_by, num_steps=2, validate_every=1)
    fit_here(config, store_folder, tmp_path)
    path = find_checkpoint(tmp_path)
    record = read_record(path)
    old = {name: record.validation[name] for name in ("mIoU", "IoU_FG", "AP")}
    loop = record.loop | {"best": 2.0, "rate": record.loop["rate"] | {"best": 2.0}}
    write_record(path, record.model_copy(update={"loop": loop, "validation": old}))
    fit_here(make(config, num_steps=3), store_folder, tmp_path, resume=True)
    loop = read_record(find_checkpoint(tmp_path)).loop
    assert (loop["best"] < 1, loop["rate"]["best"] < 1) == (forgotten, forgotten)
    assert ("best_by was AP_clipseg, is AP" in caplog.text) == forgotten


@pytest.mark.parametrize("before", ["bfloat16 on cuda", "float32 on cpu"])
def test_going_on_in_another_arithmetic_is_said(begun, store_folder, caplog, before):
    config = make(PROBE, schedule="constant", num_steps=5)
    fit_here(config, store_folder, begun(arithmetic=before), resume=True)
    said = "computed in bfloat16 on cuda until step 4 and goes on in float32 on cpu"
    assert (said in caplog.text) == (before != "float32 on cpu")


@pytest.mark.parametrize(("area", "share"), [(0.0, 1e-4), (1.0, 1 - 1e-4)])
def test_masks_of_all_or_nothing_are_a_start_too(
    tmp_path, store_folder, monkeypatch, caplog, area, share
):
    monkeypatch.setattr("pipeline.train.fit.mean_area", lambda reader: area)
    fit_here(make(PROBE, num_steps=1), store_folder, tmp_path)
    assert f"cover {area:g} of their views on average; the head starts at {share:g}" in caplog.text
    assert "head.start_at_prior: false" in caplog.text


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, store_folder):
    config = make(PROBE, learning_rate=1e30, clip_norm=1e30, num_steps=30)
    with pytest.raises(FloatingPointError, match=r"step \d+: the loss is "):
        fit_here(config, store_folder, tmp_path)


def test_the_room_of_a_checkpoint_is_foreseen(tmp_path, small_disk, store_folder):
    config = make(head="znet", num_steps=1)
    fit_here(config, store_folder, tmp_path / "run")
    head, _ = load_checkpoint(tmp_path / "run")
    files = find_checkpoint(tmp_path / "run").glob("*.safetensors")
    num_bytes = count_checkpoint_bytes(head)
    assert num_bytes == pytest.approx(sum(path.stat().st_size for path in files), rel=0.1)
    out = small_disk(num_bytes // 2)
    with pytest.raises(OSError, match=r"the 1 checkpoints to come take .* MB each"):
        fit_here(config, store_folder, out)
    assert not (out / "metrics.jsonl").exists()


def test_a_score_that_is_not_a_number_is_no_best(tmp_path, store_folder, monkeypatch):
    scores = iter([math.nan, 0.2, math.nan])
    figures = {"mIoU": 0.0, "AP": 0.0}
    monkeypatch.setattr(
        "pipeline.train.validation.Validation.score",
        lambda *_, **__: figures | {"IoU_FG": next(scores)},
    )
    fit_here(make(PROBE, num_steps=6, validate_every=2), store_folder, tmp_path)
    assert read_record(tmp_path / "best").step == 4


def test_a_new_head_starts_at_the_masks_mean_area(tmp_path, store_folder):
    """The first loss is about that of a constant prediction of the mean area."""
    config = make(head="probe", num_steps=1, batch_size=27, learning_rate=1e-9, validation_pairs=1)
    fit_here(config, store_folder, tmp_path / "prior")
    head = HeadConfig(name="probe", start_at_prior=False)
    fit_here(make(config, head=head), store_folder, tmp_path / "zero")
    train, _ = open_readers(config, open_layers(str(store_folder)))
    area = train.index["mask_area"].to_numpy().mean()
    entropy = -(area * np.log(area) + (1 - area) * np.log(1 - area))
    assert losses(tmp_path / "prior")[1] == pytest.approx(entropy, rel=0.1)
    assert losses(tmp_path / "zero")[1] > 1.5 * entropy


def test_a_probe_learns_from_features_alone(tmp_path, store_folder):
    config = make(PROBE, num_steps=60, batch_size=8, validate_every=60, learning_rate=3e-3)
    fit_here(config.model_copy(update={"log_every": 1}), store_folder, tmp_path)
    values = list(losses(tmp_path).values())
    assert np.mean(values[-8:]) < 0.9 * np.mean(values[:4])


def test_overlays_are_drawn_at_each_validation(tmp_path, store_folder):
    fit_here(make(PROBE, num_steps=4, overlays=True), store_folder, tmp_path)
    names = sorted(path.name for path in (tmp_path / "overlays").iterdir())
    assert names == ["step-000002.png", "step-000004.png"]


def test_records_are_json_with_the_figures_that_are_followed(whole):
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if "loss" in line]
    assert [record["step"] for record in steps] == [3, 6, 9, 12]
    assert all(0 <= record["data_wait"] <= 1 and record["pairs_per_s"] > 0 for record in steps)
