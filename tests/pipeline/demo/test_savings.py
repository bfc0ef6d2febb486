"""What encoding took against recomputing, over the trials of real sweeps."""

import numpy as np
import pytest

from pipeline.demo import savings
from pipeline.demo.savings import PairCost, count_reads, measure_savings, time_pair
from pipeline.store.store import Store
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.trials import plan_sweep

STEPS = {"num_steps": 3, "batch_size": 4, "validation_pairs": 5}
READS = 3 * 4 + 5


def plan(store_folder, out, *names, **more):
    axes = {"head": names, **more}
    given = {"base": {"head": {"name": "znet"}, **STEPS}, "axes": axes}
    return plan_sweep(SweepConfig.model_validate(given), str(store_folder), out)


@pytest.fixture
def features(store_folder):
    (layer,) = [x for x in Store.open(str(store_folder)).list_layers() if x.kind == "features"]
    return layer


def test_each_kind_of_head_is_timed_once_and_its_reads_are_charged(
    store_folder, tmp_path, features, monkeypatch
):
    timed = []

    def time(config, source, layer):
        kind = config.head.name, max(config.head.blocks, default=0)
        timed.append(kind)
        return PairCost(read_s=1.0, recompute_s={"znet": 10.0, "probe": 100.0}[kind[0]])

    monkeypatch.setattr(savings, "time_pair", time)
    sweeps = [
        plan(store_folder, tmp_path / "a", "znet", "probe", seeds=[0, 1], blocks=[[8]]),
        plan(store_folder, tmp_path / "b", "probe", blocks={"each": "all"}),
    ]
    found = measure_savings(sweeps, features=features, encode_s=50.0)
    assert len(timed) == len(set(timed))
    num_blocks = len(features.features.blocks)
    assert found.num_heads == 4 + num_blocks
    assert found.num_reads == READS * found.num_heads  # the baselines' are nobody's
    assert found.recompute_s == pytest.approx(READS * (2 * 10 + (2 + num_blocks) * 100))
    assert found.read_s == pytest.approx(found.num_reads)
    expected = found.recompute_s - found.read_s - 50.0
    assert found.saved_s == pytest.approx(expected)


def test_reads_are_those_of_the_steps_and_one_validation(store_folder, tmp_path):
    (trial, _) = plan(store_folder, tmp_path, "ldznet").trials
    assert count_reads(trial) == READS


@pytest.mark.parametrize("head", ["rgbnet", "znet", "ldznet", "probe"])
def test_a_pair_of_every_head_is_timed_both_ways(store_folder, tmp_path, features, head):
    swept = plan(store_folder, tmp_path, head)
    trial = swept.trials[0]
    cost = time_pair(trial.config, swept.open_layers(trial), features)
    assert 0 < cost.read_s < np.inf
    assert 0 < cost.recompute_s < np.inf
