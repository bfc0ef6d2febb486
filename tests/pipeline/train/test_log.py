"""The training log: what a resumed run takes back, torn lines, TensorBoard's events."""

import json
from contextlib import closing

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.base.progress import Progress
from pipeline.train.log import METRICS, OVERLAYS, TENSORBOARD, StepRecord, TrainLog, read_steps

FIGURES = ("loss", "learning_rate", "grad_norm", "pairs_per_s", "data_wait")


def make_record(step):
    return StepRecord(step, 1 / step, 1e-3, 2.0, 100.0, 0.01)


def read_lines(out):
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def write_steps(out, steps, *, first_step=0):
    with closing(TrainLog(out, first_step=first_step)) as log:
        for step in steps:
            log.add_step(make_record(step))
            if step % 2 == 0:
                log.add_validation(step, {"AP": step / 10, "mIoU": 0.5})


def read_events(out):
    events = EventAccumulator(str(out / TENSORBOARD), purge_orphaned_data=True)
    events.Reload()
    return events


def test_records_are_lines_and_events(tmp_path):
    write_steps(tmp_path, [1, 2])
    assert read_lines(tmp_path) == [
        {"step": 1, "loss": 1.0, "learning_rate": 1e-3, "grad_norm": 2.0, "pairs_per_s": 100.0,
         "data_wait": 0.01},
        {"step": 2, "loss": 0.5, "learning_rate": 1e-3, "grad_norm": 2.0, "pairs_per_s": 100.0,
         "data_wait": 0.01},
        {"step": 2, "validation": {"AP": 0.2, "mIoU": 0.5}},
    ]  # fmt: skip
    events = read_events(tmp_path)
    names = {f"train/{name}" for name in FIGURES} | {"validation/AP", "validation/mIoU"}
    assert set(events.Tags()["scalars"]) == names
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(tmp_path):
    write_steps(tmp_path / "whole", range(1, 9))
    write_steps(tmp_path / "killed", range(1, 7))
    write_steps(tmp_path / "killed", range(5, 9), first_step=4)
    assert read_lines(tmp_path / "killed") == read_lines(tmp_path / "whole")
    whole, killed = read_events(tmp_path / "whole"), read_events(tmp_path / "killed")
    for name in ("train/loss", "validation/AP"):
        points = [[(e.step, e.value) for e in x.Scalars(name)] for x in (whole, killed)]
        assert points[0] == points[1]


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    write_steps(tmp_path, [1, 3])
    path = tmp_path / METRICS
    path.write_bytes(path.read_bytes()[:-cut])
    write_steps(tmp_path, [3, 5], first_step=1)
    assert [record["step"] for record in read_lines(tmp_path)] == [1, 3, 5]


def test_the_commands_own_lines_stay(tmp_path):
    """The driver has the file open to append to before a worker takes records back."""
    write_steps(tmp_path, [1, 3, 5])
    progress = Progress(
        "train", total=9, unit="steps", metrics_path=tmp_path / METRICS, terminal=False
    )
    with progress:
        write_steps(tmp_path, [3], first_step=1)
    found = [record.get("verb", record.get("step")) for record in read_lines(tmp_path)]
    assert [step for step in found if step != "train"] == [1, 3]
    verbs = [record for record in read_lines(tmp_path) if "verb" in record]
    assert [record["status"] for record in verbs] == ["running", "done"]


def test_overlays_are_a_sheet_and_an_image_and_are_taken_back(tmp_path):
    images = np.zeros((3, 8, 24, 3), np.uint8)
    with closing(TrainLog(tmp_path, first_step=0)) as log:
        for step in (2, 4):
            log.add_overlays(step, images, ["a", "b", "c"])
    folder = tmp_path / OVERLAYS
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002.png", "step-000004.png"]
    with Image.open(folder / "step-000002.png") as sheet:
        assert sheet.mode == "RGB"
        shown = read_events(tmp_path).Images("validation/overlays")
        assert [(e.step, (e.width, e.height)) for e in shown] == [(2, sheet.size), (4, sheet.size)]
    TrainLog(tmp_path, first_step=3).close()
    assert [path.name for path in folder.iterdir()] == ["step-000002.png"]


def test_lines_that_are_no_records_are_passed_over():
    data = b'{"step": 1}\n[1]\n{"verb": "train", "done": 3}\nnonsense\n{"step": 2}\n{"step": 3}'
    assert [step for step, _ in read_steps(data)] == [1, None, 2]
