"""A demo's times and folder: what is done is not done again, and what it took is kept."""

import json
from pathlib import Path

import pytest

from pipeline.base.yaml import load_yaml
from pipeline.demo import run as module
from pipeline.demo.recipe import SIZES, DemoRecipe
from pipeline.demo.run import Demo, StageTimes, run_demo

RECIPE = Path(__file__).parents[3] / "jobs" / "recipes" / "demo.yaml"


@pytest.fixture
def ticks(monkeypatch):
    """A clock that goes on by one second at each look."""
    now = iter(range(1000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))


def test_seconds_add_up_over_runs(tmp_path, ticks):
    path = tmp_path / "seconds.json"
    for _ in range(2):
        times = StageTimes(path)
        with times.measure("encode"):
            pass
        with times.measure("price", again=True):
            pass
    assert StageTimes(path).seconds == {"encode": 2.0, "price": 1.0}


def test_an_interrupted_stage_was_paid_too(tmp_path, ticks):
    times = StageTimes(tmp_path / "seconds.json")
    with pytest.raises(KeyboardInterrupt), times.measure("encode"):
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "seconds.json").read_text()) == {"encode": 1.0}


def test_a_folder_is_of_one_demo(tmp_path, monkeypatch):
    recipe = load_yaml(RECIPE, DemoRecipe)

    def stop(demo):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_scenes", stop)
    for size in ("smallest", "smallest"):
        with pytest.raises(KeyboardInterrupt):
            run_demo(Demo(tmp_path, SIZES[size], recipe), say=print)
    with pytest.raises(ValueError, match=r"holds a demo of another size or version; remove"):
        run_demo(Demo(tmp_path, SIZES["default"], recipe), say=print)
