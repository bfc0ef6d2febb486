"""A head of one's own: one file and one line of the registry, through every command for heads."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from models.heads.registry import HEADS, load_head
from pipeline.base.yaml import SpecError, parse_yaml
from pipeline.evaluate.run import run_evaluate
from pipeline.runs.config import TrainConfig
from pipeline.segment import Segmenter
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.run import run_sweep
from pipeline.sweep.trials import plan_sweep
from pipeline.train.run import run_train
from tests.support.fifth_head import FifthHead, FifthOptions
from tests.support.train_runs import losses

TRAIN = """
head: {name: fifth, blocks: [7, 9], depth: 2}
num_steps: %d
batch_size: 4
learning_rate: 1.0e-3
log_every: 1
"""
SWEEP = """
base: {head: {name: fifth, blocks: [8]}, num_steps: 2, batch_size: 4}
axes: {head: [fifth, znet], depth: [1, 2], initialise: [ldm, random]}
"""


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The registry's line."""
    path = "tests.support.fifth_head:"
    monkeypatch.setitem(HEADS, "fifth", (f"{path}FifthHead", f"{path}FifthOptions"))


def test_it_is_trained_resumed_evaluated_and_segments(tmp_path, store_folder):
    for num_steps in (2, 3):
        config = parse_yaml(TRAIN % num_steps, TrainConfig, where="train.yaml")
        checkpoint = run_train(
            config, str(store_folder), tmp_path, num_workers=0, resume=num_steps > 2
        )
    assert sorted(losses(tmp_path)) == [1, 2, 3]
    assert config.head.options == FifthOptions(blocks=(7, 9), depth=2)
    saved = json.loads((checkpoint / "config.json").read_text())
    assert (saved["head"], saved["depth"], *saved["feature_channels"]) == ("fifth", 2, "7", "9")
    head = load_head(checkpoint)
    assert isinstance(head, FifthHead)
    assert len(head.layers) == 2
    rows = run_evaluate(str(store_folder), checkpoint)
    assert rows[0].name == "fifth"
    assert rows[0].scores.num_pairs > 0
    image = np.random.default_rng(0).integers(0, 256, (64, 100, 3), dtype=np.uint8)
    probability = Segmenter(checkpoint, device="cpu").segment(image, "circle")
    assert probability.shape == (64, 100)
    assert 0 < probability.min() < probability.max() < 1
    other = parse_yaml(TRAIN.replace("depth: 2", "depth: 1") % 4, TrainConfig, where="train.yaml")
    with pytest.raises(SpecError, match=r"head\.depth was 2, is 1\. Give"):
        run_train(other, str(store_folder), tmp_path, num_workers=0, resume=True)


def test_its_option_is_an_axis_of_a_sweep_and_a_column_of_its_table(tmp_path, store_folder):
    config = parse_yaml(SWEEP, SweepConfig, where="sweep.yaml")
    plan = plan_sweep(config, str(store_folder), tmp_path)
    heads = [trial for trial in plan.trials if not trial.is_baselines]
    assert len({trial.id for trial in heads}) == len(heads) == 4
    # It reads no ``initialise``, and a ZNet no ``depth``.
    depths = [t.config.head.options.depth for t in heads if t.config.head.name == "fifth"]
    assert depths == [1, 2]
    run_sweep(plan, at_once=0)
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert {row["status"] for row in rows} == {"done"}
    found = [(r["head"], r["options"], r["blocks"], r["initialise"]) for r in rows if r["steps"]]
    assert found == [
        ("fifth", "depth 1", [8], None),
        ("fifth", "depth 2", [8], None),
        ("znet", None, None, "ldm"),
        ("znet", None, None, "random"),
    ]
    lines = (tmp_path / "results.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in lines if "|" in line]
    assert cells[0] == ["head", "initialise", "options"]
    assert cells[2:4] == [["fifth", "", "depth 1"], ["fifth", "", "depth 2"]]


def test_a_value_that_it_does_not_take_is_refused_with_the_field():
    with pytest.raises(SpecError, match=r"head\.depth: Input should be greater than or equal to 1"):
        parse_yaml(TRAIN.replace("depth: 2", "depth: 0") % 2, TrainConfig, where="train.yaml")
    with pytest.raises(SpecError, match=r"head\.deep: no such field; there are name, .*, depth"):
        parse_yaml(TRAIN.replace("depth: 2", "deep: 2") % 2, TrainConfig, where="train.yaml")
